"""Positions in two bytes where no text is longer: the same cache as with four."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx import ArkvConfig
from arkv_fx.kernels.cpp import available
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.plan import SHORT, LayerPlan, Tier, limit_of, plan_layer
from arkv_fx.state.session import LayerState
from arkv_fx.state.unwind import unwind

HEADS, DIM = 2, 16
LONG = LayerPlan(
    HEADS, DIM, DIM, torch.float32, 5, 2, 0, (Tier("k8v4", 6), Tier("k4v3", 9)), "combined"
)


def inputs(length: int, generator: torch.Generator) -> Iterator[Tensor]:
    for heads in (2 * HEADS, HEADS, HEADS):
        yield torch.randn(2, heads, length, DIM, generator=generator)


Attend = Callable[..., Tensor]


def through(kernel: str) -> Attend:
    """``attend`` as it is, or compiled."""
    if kernel != "inductor":
        return attend
    torch._dynamo.reset()

    def run(q: Any, k: Any, v: Any, mask: Any, state: Any, plan: Any, knobs: Any, fresh: bool,
            kernel: str) -> Any:  # fmt: skip
        return torch.ops.arkv.attend(
            q, k, v, mask, state, plan.to_json(), knobs.scale, 0.0, None, fresh, kernel
        )

    return torch.compile(run, dynamic=False)


def history(plan: LayerPlan, kernel: str, start: int, steps: int = 14) -> tuple[Any, LayerState]:
    """A prompt, a chunk and tokens that ``kernel`` decodes, the first at position ``start``."""
    generator, state = torch.Generator().manual_seed(0), LayerState(plan, 2, torch.device("cpu"))
    state["seen"].fill_(start)
    run, outs = through(kernel), []
    for number, length in enumerate((20, 4, *[1] * steps)):
        call = (None, state.tensors, plan, Knobs(0.25), number == 0, kernel)
        outs.append((run if length == 1 else attend)(*inputs(length, generator), *call))
    return outs, state


@pytest.mark.parametrize(
    ("kernel", "sliding"),
    [("reference", 0), ("reference", 11), ("cpp", 0), ("cpp", 11), ("inductor", 11)],
)
def test_all_is_as_with_long_ones(kernel: str, sliding: int) -> None:
    """Up to the last position that there is."""
    if kernel == "cpp" and (reason := available()):
        pytest.skip(reason)
    plan = replace(LONG, sliding=sliding, sinks=0 if sliding else LONG.sinks)
    if kernel == "inductor":  # it compiles for minutes what else is here
        plan = replace(plan, tiers=(Tier("native", 9),))
    short = replace(plan, short_positions=True)
    (outs, state), (others, other) = (history(each, kernel, SHORT - 38) for each in (plan, short))
    assert all(map(torch.equal, outs, others))
    assert (state["pos"].dtype, other["pos"].dtype) == (torch.int32, torch.int16)
    assert int(other["pos"].max()) == SHORT - 1 == int(other["seen"].max()) - 1
    for name, held in state.named().items():
        found = other[name]
        assert torch.equal(held, found.int() if name == "pos" else found), name


def test_one_more_would_not_fit() -> None:
    """Negative control: what the refusal is there for."""
    short = replace(LONG, short_positions=True)
    _, state = history(short, "reference", SHORT - 37)
    assert int(state["pos"].min()) == -SHORT
    _, state = history(LONG, "reference", SHORT - 37)
    assert int(state["pos"].max()) == SHORT


@pytest.mark.parametrize("tiers", [(Tier("native", 40),), (Tier("native", 12), Tier("native", 30))])
def test_tokens_are_taken_back(tiers: tuple[Tier, ...]) -> None:
    found = []
    for short in (False, True):
        plan = replace(LONG, tiers=tiers, short_positions=short)
        _, state = history(plan, "reference", 0)
        unwind(state, 7)
        state.select(torch.tensor([1, 1, 0]))
        found.append(state)
    assert found[1]["pos"].dtype == torch.int16
    for name, held in found[0].named().items():
        assert torch.equal(held.double(), found[1][name].double()), name


def test_who_decides() -> None:
    shape: dict[str, Any] = {"heads": 2, "k_dim": 64, "v_dim": 64, "dtype": torch.bfloat16}
    for positions, short in ((None, False), (1, True), (SHORT - 1, True), (SHORT, False)):
        plan = plan_layer(ArkvConfig(), **shape, positions=positions)
        assert plan.short_positions is short and (plan.limit == SHORT) is short
        assert (limit_of(positions) == SHORT) is short
        assert plan_layer(ArkvConfig(), **shape, positions=plan.positions) == plan
        assert LayerPlan.parse(plan.to_json()) == plan
    # The bytes go to more tokens.
    long, short_plan = (plan_layer(ArkvConfig(), **shape, positions=n) for n in (None, 1))
    assert short_plan.slots > long.slots
    assert short_plan.nbytes() <= short_plan.full_nbytes(4096) / 4
