"""No index of a decode step is ever out of range: on CUDA that ends the process's work, not a call.

Not even for NaN, which equals nothing, so that a search by equality finds nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arkv_fx import ArkvCache, ArkvConfig, models, transform
from arkv_fx.errors import NonFiniteError
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops import exchange
from arkv_fx.ops.attend import attend
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.state.session import LayerState, check_finite

KERNELS = ("reference", "inductor", "export")
aten = torch.ops.aten


class InRange(TorchDispatchMode):
    """Every index is that of an element, counted from the front; ``checked`` counts them."""

    checked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.gather.default, aten.index_select.default):
            self.check(args[0].shape[args[1]], args[2])
        elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            for size, index in zip(args[0].shape, args[1], strict=False):
                if index is not None and index.dtype != torch.bool:
                    self.check(size, index)
        return func(*args, **(kwargs or {}))

    def check(self, size: int, index: Tensor) -> None:
        assert ((index >= 0) & (index < size)).all()
        self.checked += 1


def filled() -> tuple[LayerPlan, LayerState]:
    """A layer whose tiers are full."""
    tiers = (Tier("k8v4", 4), Tier("k4v3", 6))
    plan = LayerPlan(2, 8, 8, torch.float32, 4, 1, 0, tiers, "combined")
    state = LayerState(plan, 2, torch.device("cpu"))
    q, k, v = (torch.randn(2, heads, 30, 8) for heads in (4, 2, 2))
    attend(q, k, v, None, state.tensors, plan, Knobs(1.0), True)
    return plan, state


def decode(plan: LayerPlan, state: LayerState, kernel: str, fill: float | None = None) -> None:
    q, k, v = (torch.randn(2, heads, 1, 8) for heads in (4, 2, 2))
    if fill is not None:
        k[1] = fill
    with InRange() as mode:
        attend(q, k, v, None, state.tensors, plan, Knobs(1.0), False, kernel)
    assert mode.checked > 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_that_are_not_finite(kernel: str, bad: float) -> None:
    plan, state = filled()
    decode(plan, state, kernel, bad)
    for _ in range(6):  # it leaves the ring, and comes to the tiers
        decode(plan, state, kernel)
    with pytest.raises(NonFiniteError, match=r"sequence\(s\) \[1\]"):
        check_finite([(0, state)])


@pytest.mark.parametrize("found", [-(2**31), 2**31 - 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_search_that_finds_nothing(
    kernel: str, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's CUDA kernels have such rows: what a maximum of no numbers is."""
    plan, state = filled()
    monkeypatch.setattr(
        exchange, "_weakest", lambda rank: torch.full(rank.shape[:2], found, dtype=torch.int64)
    )
    decode(plan, state, kernel)


def test_of_nan_the_last_is_the_weakest() -> None:
    rank = torch.tensor([[[2.0, 1, 1, 3]], [[2, float("nan"), 1, 3]]])
    assert exchange._weakest(rank).tolist() == [[2], [3]]


@pytest.mark.parametrize(
    ("lowering", "kernels"),
    [("eager", None), ("inductor", None), ("inductor", ["inductor"])],
)
def test_a_model_says_that_there_is_nan(
    lowering: str, kernels: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels:  # as where there is no compiler of C++
        monkeypatch.setattr("arkv_fx.compile.pieces.usable", lambda *_: kernels)
    model = models.random_model("llama", num_hidden_layers=1)
    transform(model, ArkvConfig(budget=32, window=4, sinks=2), compile=lowering)
    with torch.no_grad():
        model.get_input_embeddings().weight[100] = float("nan")
        cache = ArkvCache(model)
        model(torch.arange(1, 61)[None], past_key_values=cache)
        with pytest.raises(NonFiniteError, match=r"layer 0: .*\[0\].*start a new one"):
            for token in (3, 100, 4):
                model(torch.tensor([[token]]), past_key_values=cache)
