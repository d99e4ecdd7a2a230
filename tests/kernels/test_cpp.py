"""The C++ kernel against the reference, on states that hold real tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from kernel_cases import TOLERANCE, Case, arguments, cases, compare, recorded
from torch import Tensor

import arkv_fx.kernels.cpp.build as build
from arkv_fx.errors import KernelError
from arkv_fx.kernels import get_kernel
from arkv_fx.kernels.cpp import available
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.state.view import View

reason = available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


def check(case: Case) -> None:
    torch.set_num_threads(case.threads)
    compare("cpp", arguments(case)[1], case.dtype)


# Enough work for two threads, which small shapes are not given.
LARGE = Case(300, (0, 7), 3, 8, 128, 128, (("k8v4", 100), ("k4v3", 150)), mask="bool")


@settings(max_examples=100)
@given(case=cases())
@example(Case(groups=17, dtype=torch.bfloat16))
@example(Case(k_dim=128, v_dim=64, length=300, threads=2, dtype=torch.float16))
@example(replace(LARGE, threads=2))
@example(replace(LARGE, threads=2, dtype=torch.bfloat16, mask="bool-heads"))
@example(Case(k_dim=64, v_dim=128, pad=(0, 61), mask="lowest"))  # a row that sees nothing
@example(Case(length=1, tiers=(("native", 0),)))
def test_it_equals_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tiers", ["native", "bf16", "fp8", "int8", "int4", "k8v4", "k4v3"])
def test_every_format_with_every_dtype(tiers: str, dtype: torch.dtype) -> None:
    for dims, groups in (((128, 128), 4), ((64, 64), 3), ((24, 40), 1)):
        case = Case(150, (0, 9), 2, groups, *dims, ((tiers, 200),), dtype=dtype, mask="bool")
        check(case)


@pytest.mark.parametrize("tiers", ["int8", "k8v4", "k4v3"])
def test_rounding_does_not_grow_with_the_slots(tiers: str) -> None:
    """Codes are unsigned: their sum, before the zero points come off, dwarfs that of the values."""
    check(Case(2100, (0,), 2, 4, 128, 128, ((tiers, 2000),)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_far_within_its_rounding(dtype: torch.dtype) -> None:
    """An outlier channel in the queries, as models have them, makes 16 bits coarser for others."""
    _, args = arguments(Case(k_dim=64, v_dim=64, dtype=dtype, length=100))
    q = args["q"]
    assert isinstance(q, Tensor)
    q[..., 3] *= 20
    out, probs = get_kernel("reference")(**args)  # type: ignore[arg-type]
    found, shares = get_kernel("cpp")(**args)  # type: ignore[arg-type]
    assert float((out - found).abs().max() / out.abs().max()) < 5e-4
    assert float((probs - shares).abs().max() / probs.abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_whatever_lies_in_empty_slots(dtype: torch.dtype) -> None:
    case = Case(length=20, tiers=(("native", 30), ("int8", 30)), dtype=dtype)
    outputs = []
    for poison in (False, True):
        layer, args = arguments(case)
        for segment in layer.state.view().segments:
            empty = (segment.pos < 0)[..., None]
            for part in (*segment.k, *segment.v):
                if poison:
                    part.masked_fill_(empty, 3e4 if part.is_floating_point() else 127)
        outputs.append(get_kernel("cpp")(**args))  # type: ignore[arg-type]
    assert all(torch.equal(x, y) for x, y in zip(*outputs, strict=True))


def test_noncontiguous_tensors() -> None:
    _, args = arguments(Case(pad=(0, 3), mask="bool"))
    changed = {}
    for name in ("q", "k", "v", "mask"):
        x = args[name]
        assert isinstance(x, Tensor)
        changed[name] = x.repeat_interleave(2, -1)[..., ::2]
        assert not changed[name].is_contiguous()
    compare("cpp", args, torch.float32, **changed)


def test_attend_takes_it() -> None:
    """With the plain update of the state, for a score that the C++ step does not know."""
    results = []
    for kernel in ("reference", "cpp"):
        layer, args = arguments(Case(length=40), score="paper")
        q, k, v = args["q"], args["k"], args["v"]
        assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
        knobs = Knobs(0.2)
        state = layer.state.tensors
        out = attend(q.flatten(1, 2), k, v, None, state, layer.plan, knobs, False, kernel)
        results.append([out, *(t.float() for t in state)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# Tracing


@pytest.mark.parametrize("case", [Case(), Case(mask="additive-heads", sink_logits=True)])
def test_operator_is_well_formed(case: Case) -> None:
    operator = torch.ops.arkv_cpu.attend.default
    _, args = arguments(case)
    torch.library.opcheck(operator, recorded(operator, lambda: get_kernel("cpp")(**args)))


@pytest.mark.parametrize("case", [Case(), Case(pad=(0, 2), mask="bool", dtype=torch.bfloat16)])
def test_it_compiles_as_one_graph(case: Case) -> None:
    _, args = arguments(case)
    expected = get_kernel("cpp")(**args)  # type: ignore[arg-type]
    found = torch.compile(get_kernel("cpp"), fullgraph=True)(**args)  # type: ignore[arg-type]
    for x, y in zip(expected, found, strict=True):
        assert torch.equal(x, y)


# What it refuses


def test_other_devices_and_dtypes() -> None:
    _, args = arguments(Case())
    for wrong in (torch.zeros(1, 2, 2, 1, 16, device="meta"), torch.zeros(1, 2, 2, 1, 16).double()):
        with pytest.raises(KernelError, match="choose the kernel 'reference'"):
            get_kernel("cpp")(**{**args, "q": wrong})  # type: ignore[arg-type]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "source", lambda: "no C++ at all")
    build.load.cache_clear()
    build.available.cache_clear()
    try:
        assert "install a C++" in build.available()
        with pytest.raises(KernelError, match="choose another kernel"):
            build.load()
    finally:
        build.load.cache_clear()
        build.available.cache_clear()


# Negative controls: the comparison must notice each of these.


def _shifted(tensors: list[Tensor]) -> list[Tensor]:
    return [t + 40 if t.dtype == torch.uint8 and t.shape[-1] == 1 else t for t in tensors]


def _last(held: View, **fields: Callable[[list[Tensor]], list[Tensor]]) -> View:
    """With other codes in the last tier."""
    tier = held.segments[-1]
    changed = {name: change(getattr(tier, name)) for name, change in fields.items()}
    return replace(held, segments=[*held.segments[:-1], replace(tier, **changed)])


BROKEN: dict[str, Callable[[View], View]] = {
    "zero points of keys": lambda h: _last(h, k=_shifted),
    "zero points of values": lambda h: _last(h, v=_shifted),
    "scales": lambda h: _last(h, v=lambda v: [v[0], *(t.roll(1, 2) for t in v[1:])]),
    "codes": lambda h: _last(h, k=lambda k: [k[0].roll(1, -1), *k[1:]]),
    "centre": lambda h: replace(h, centre=None),
    "empty slots": lambda h: replace(h, pos=h.pos.clamp(min=0)),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_state_is_noticed(name: str, dtype: torch.dtype) -> None:
    _, args = arguments(Case(dtype=dtype, k_dim=64, v_dim=64))
    compare("cpp", args, dtype)
    held = args["held"]
    assert isinstance(held, View)
    with pytest.raises(AssertionError, match=r"output|probabilities"):
        compare("cpp", args, dtype, held=BROKEN[name](held))


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        (Case(softcap=1.0), {"knobs": Knobs(0.125)}),
        (Case(sink_logits=True), {"knobs": Knobs(0.125)}),
        (Case(mask="bool-heads"), {"mask": None}),
    ],
)
def test_a_broken_argument_is_noticed(case: Case, changed: dict[str, object]) -> None:
    _, args = arguments(case)
    compare("cpp", args, case.dtype)
    with pytest.raises(AssertionError, match=r"output|probabilities"):
        compare("cpp", args, case.dtype, **changed)
