"""The Triton kernel against the reference, in Triton's interpreter: see `test_triton`.

States are filled by real tokens, whose calls came in any order; then both kernels answer the same
query about the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import triton
from hypothesis import example, given, settings
from reference_attention import MASKS, TOLERANCE, Layer, make_mask
from torch import Tensor
from triton.runtime import interpreter

import arkv_fx.kernels.gpu as kernel
import arkv_fx.kernels.gpu.combine as combine_module
import arkv_fx.kernels.gpu.decode as decode_module
import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx.formats import FORMATS
from arkv_fx.kernels import KERNELS
from arkv_fx.kernels.gpu import launch
from arkv_fx.kernels.softmax import Knobs, group
from arkv_fx.plan import LayerPlan, Tier


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """So that a few dozen slots are several blocks, and several chunks of several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "block_slots", lambda plan: 16)
        yield


@pytest.fixture(autouse=True, scope="module")
def scalars_are_indices() -> Iterator[None]:
    """Triton 3.6 keeps a scalar as an array of one, which numpy 2.4 makes no loop bound of.

    No kernel with a loop of a length that is an argument runs there; Triton 3.7 does as this.
    """
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    with pytest.MonkeyPatch.context() as patch:
        if triton.__version__.startswith("3.6."):
            patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


@dataclass(frozen=True)
class Case:
    """One layer, the lengths of the calls that fill it, and left padding per row."""

    lengths: tuple[int, ...] = (40, 1)
    pad: tuple[int, ...] = (0,)
    heads: int = 1
    groups: int = 2
    k_dim: int = 16
    v_dim: int = 16
    window: int = 4
    sinks: int = 2
    tiers: tuple[tuple[str, int], ...] = (("k8v4", 17), ("k4v3", 20))
    sliding: int = 0
    dtype: torch.dtype = torch.float32
    mask: str = "bool"
    softcap: float = 0.0
    sink_logits: bool = False
    window_format: str = "native"
    seed: int = 0
    short: bool = False  # positions in int16

    def plan(self) -> LayerPlan:
        return LayerPlan(
            self.heads, self.k_dim, self.v_dim, self.dtype, self.window, self.sinks, self.sliding,
            tuple(Tier(*t) for t in self.tiers), "combined", (), self.window_format,
            short_positions=self.short,
        )  # fmt: skip


def compare(case: Case) -> None:
    """Output and probabilities of one more token equal the reference's."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    batch, query_heads = len(case.pad), case.heads * case.groups
    layer = Layer(case.plan(), batch)
    sink_logits = normal(query_heads) if case.sink_logits else None
    knobs = Knobs(case.k_dim**-0.5, case.softcap, sink_logits)
    common = 3 * normal(1, case.heads, 1, case.k_dim)  # what the centre takes off the keys
    for number, length in enumerate((*case.lengths, 1)):
        q = 2 * normal(batch, query_heads, length, case.k_dim)
        k = normal(batch, case.heads, length, case.k_dim) + common
        v = normal(batch, case.heads, length, case.v_dim)
        position = torch.arange(layer.seen, layer.seen + length)
        valid = position[None] >= torch.tensor(case.pad)[:, None]
        mask = make_mask(
            torch.cat([layer.valid, valid], 1), length, kind=case.mask, heads=query_heads,
            sliding=case.sliding, dtype=case.dtype, generator=generator,
        )  # fmt: skip
        if number < len(case.lengths):
            layer.step(q, k, v, mask, knobs, valid, fresh=number == 0)
    held = layer.state.view()
    given = (group(q, case.heads), k, v, mask, held, knobs, held.seen[:, None])
    expected = KERNELS["reference"].attend(*given)
    got = KERNELS["triton"].attend(*given)
    for name, a, b in zip(("output", "probabilities"), got, expected, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        # A query that sees nothing gives zeros, and a hidden slot gets none: exactly.
        assert (a[b == 0] == 0).all(), f"{name} of {case}: not zero"
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        assert error <= TOLERANCE[case.dtype], f"{name} of {case}: {error:.1e}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    filled = draw(st.integers(1, 70))
    total = filled + 2
    sliding = draw(st.sampled_from((0, 0, 0, 5, 40)))
    names = draw(st.lists(st.sampled_from(tuple(FORMATS)), max_size=2))
    dims = (8, 24, 32) if {"int4", "k8v4", "k4v3"} & {*names} else (5, 16, 24, 40)
    pad = draw(st.one_of(st.just((0,)), st.lists(st.integers(0, total), min_size=1, max_size=2)))
    return Case(
        lengths=(filled, 1),
        pad=tuple(pad),
        heads=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from((1, 2, 3, 17))),
        k_dim=draw(st.sampled_from(dims)),
        v_dim=draw(st.sampled_from(dims)),
        window=draw(st.integers(1, min(6, sliding or 6))),
        sinks=0 if sliding else draw(st.integers(0, 3)),
        tiers=tuple((n, draw(st.sampled_from((0, 1, 7, 16, 33)))) for n in names),
        sliding=sliding,
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        mask=draw(st.sampled_from(MASKS if not any(pad) else MASKS[1:])),
        softcap=draw(st.sampled_from((0.0, 0.0, 5.0))),
        sink_logits=draw(st.booleans()),
        window_format=draw(st.sampled_from(("native", "native", "bf16"))),
        seed=draw(st.integers(0, 99)),
        short=draw(st.booleans()),
    )


@settings(max_examples=30)
@given(case=cases())
@example(Case(pad=(0, 200, 30)))  # a row that never saw a real token
@example(Case(lengths=(3,)))  # mostly empty slots
@example(Case(tiers=(("fp8", 20), ("int4", 30)), k_dim=24, v_dim=40, groups=4, softcap=5.0))
@example(Case(sliding=20, sinks=0, mask="none", sink_logits=True))
def test_equals_the_reference(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format(name: str, dtype: torch.dtype) -> None:
    compare(Case(tiers=((name, 20),), dtype=dtype))


def test_what_lies_in_empty_slots_does_not_matter() -> None:
    outputs = []
    for poison in (False, True):
        layer = Layer(Case(tiers=(("native", 20), ("k8v4", 20))).plan(), 1)
        for segment in layer.state.view().segments:
            for part in (*segment.k, *segment.v) if poison else ():
                part.fill_(3e4 if part.is_floating_point() else 127)
        generator = torch.Generator().manual_seed(0)
        knobs = Knobs(0.3)
        for number, length in enumerate((9, 1)):
            q, k, v = torch.randn(3, 1, 1, length, 16, generator=generator)
            if number == 0:
                layer.step(q, k, v, None, knobs, torch.ones(1, length, dtype=torch.bool))
        held = layer.state.view()
        outputs += KERNELS["triton"].attend(
            q[:, :, None], k, v, None, held, knobs, held.seen[:, None]
        )
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_graphs_can_hold_it() -> None:
    """As one operator with a fake form."""
    plan, answers = Case().plan(), []
    text = plan.to_json()
    q, k, v = torch.randn(3, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def step(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor], kernel: str) -> Tensor:
        return torch.ops.arkv.attend(q, k, v, None, state, text, 0.3, 0.0, None, False, kernel)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for run, name in ((compiled, "triton"), (step, "reference")):
        layer = Layer(plan, 1)
        for _ in range(2):
            out = run(q, k, v, layer.state.tensors, name)
        answers.append((out, layer.state.view().segments[0].stats["mass"]))
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b)


# Negative controls: each breaks one thing, and the comparison above must notice.


def _zeros(fields: Any, base: Any, rows: Any, inside: Any, codec: Any) -> Any:
    return rows * 0.0


def _ones(fields: Any, base: Any, rows: Any, inside: Any, codec: Any) -> Any:
    return rows * 0.0 + 1.0


class Combine:
    """`combine`, its arguments changed before it starts."""

    def __init__(self, change: Callable[[list[Any]], None]) -> None:
        self.change, self.kernel = change, combine_module.combine

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            changed = list(args)
            self.change(changed)
            self.kernel[grid](*changed, **kwargs)

        return run


def _forget_last_split(args: list[Any]) -> None:
    args[2][..., -1] = float("-inf")


def _forget_sinks(args: list[Any]) -> None:
    args[4] = None


def _no_softcap(plan: Any, groups: int, cap: float, bias: int, f: Any = launch.constants) -> Any:
    return f(plan, groups, 0.0, bias)


PLAIN = Case()
BROKEN = {
    "zero points ignored": (PLAIN, decode_module, "load_zero", _zeros),
    "scales ignored": (PLAIN, decode_module, "load_scale", _ones),
    "one split forgotten": (PLAIN, combine_module, "combine", Combine(_forget_last_split)),
    "sinks ignored": (
        replace(PLAIN, sink_logits=True),
        combine_module, "combine", Combine(_forget_sinks),
    ),
    "softcap ignored": (replace(PLAIN, softcap=2.0), launch, "constants", _no_softcap),
    "centre ignored": (
        replace(PLAIN, tiers=(("native", 20), ("int8", 30))),
        kernel, "centre_logits", lambda q, segment: None,
    ),
    "not in the stored basis": (PLAIN, kernel, "stored_query", lambda q, s: q.squeeze(3).float()),
    "mask ignored": (replace(PLAIN, mask="bool-heads"), kernel, "column_bias", lambda *_: None),
    "sliding ignored": (
        replace(PLAIN, sliding=10, sinks=0, mask="none"),
        kernel, "lowest", lambda held, pos: torch.full_like(pos[:, 0], -1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, module, attribute, replacement = BROKEN[name]
    compare(case)
    monkeypatch.setattr(module, attribute, replacement)
    with pytest.raises(AssertionError, match="of Case"):
        compare(case)
