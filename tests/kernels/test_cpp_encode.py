"""Codes made in C++ against those of the codecs, and a whole prompt with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference_attention import make_mask
from torch import Tensor

import arkv_fx.ops.schema  # noqa: F401  (registers the operator)
from arkv_fx.formats import CODECS, Codec
from arkv_fx.kernels import KERNELS
from arkv_fx.kernels.cpp import available, encode_cpp
from arkv_fx.kernels.reference import encode_rows
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.state.session import LayerState

reason = available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The share of codes, and of zeros, that a rotation summed in another order may round otherwise.
RARE = 2e-3


def empty(codec: Codec, x: Tensor, slots: int) -> list[Tensor]:
    """Fields with something in them, to see what stays."""
    return [
        torch.full((*x.shape[:2], slots, f.width), 3, dtype=f.dtype)
        for f in codec.fields(x.shape[-1], x.dtype)
    ]


def codes_of(codec: Codec, fields: list[Tensor]) -> Tensor:
    """Codes as numbers one unit apart, and zeros; what else there is must be equal."""
    if codec.name not in ("int4", "int3"):
        return torch.zeros(1)
    found = codec.unpack(fields)
    runs = [run * unit for run, unit in zip(found.runs, found.units, strict=True)]
    return torch.cat([*runs, fields[2].float()], -1)


def check(
    codec: Codec, x: Tensor, source: Tensor, centre: Tensor | None, rare: float = RARE
) -> None:
    expected, found = (empty(codec, x, source.shape[-1]) for _ in range(2))
    encode_rows(codec, x, source, centre, expected)
    encode_cpp(codec, x, source, centre, found)
    exact = slice(1, 2) if codec.name in ("int4", "int3") else slice(None)
    for a, b in zip(expected[exact], found[exact], strict=True):
        # Scales of rotated vectors are rounded to eight bits: now and then to the next step.
        off = a.view(torch.uint8) != b.view(torch.uint8)
        assert off.float().mean() <= (rare if exact.stop else 0), "scales or codes differ"
    off_by = (codes_of(codec, expected) - codes_of(codec, found)).abs()
    assert (off_by <= 1).float().mean() >= 1 - rare, "codes differ by more than a unit"
    assert (off_by > 0).float().mean() <= 5 * rare, "too many codes differ"
    left = (source < 0)[..., None]
    for field, old in zip(found, empty(codec, x, source.shape[-1]), strict=True):
        assert torch.equal(field[left.expand(field.shape)], old[left.expand(field.shape)])


def vectors(dim: int, dtype: torch.dtype, batch: int = 2, heads: int = 3, n: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(batch, heads, n, dim, generator=generator) + torch.arange(dim) % 3
    return x.to(dtype)


def some_rows(x: Tensor, slots: int = 90) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-1, x.shape[2], (*x.shape[:2], slots), generator=generator)


@pytest.mark.parametrize("centred", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_codes_are_those_of_the_codec(name: str, dtype: torch.dtype, centred: bool) -> None:
    codec = CODECS[name]
    for dim in (1, 2, 6, 8, 10, 24, 40, 64, 80, 96, 128, 256):
        if dim % codec.multiple == 0:
            x = vectors(dim, dtype)
            centre = x.float().mean(2, keepdim=True) if centred and codec.centred else None
            check(codec, x, some_rows(x), centre)


@pytest.mark.parametrize("name", CODECS)
def test_extreme_values(name: str) -> None:
    x = vectors(64, torch.float32)
    for factor in (0.0, 1e-45, 1e-40, 1e-38, 1e-20, 1e20, 1e30):
        check(CODECS[name], x * factor, some_rows(x), None)
    for value in (0.0, -0.0, 1.0, -2.5, 448.0, 1e30, -1e30, 1e-44):
        check(CODECS[name], torch.full_like(x, value), some_rows(x), None)
    mixed = x * 10.0 ** torch.arange(-30, 34)
    check(CODECS[name], mixed, some_rows(x), None)


@pytest.mark.parametrize("name", CODECS)
def test_strides_and_threads(name: str) -> None:
    x = vectors(128, torch.bfloat16, n=300)
    source = some_rows(x, 500)
    check(CODECS[name], x.transpose(1, 2).contiguous().transpose(1, 2), source, None)
    check(CODECS[name], x.mT.contiguous().mT, source.mT.contiguous().mT, None)
    check(CODECS[name], x[:1].expand(2, -1, -1, -1), source, None)
    torch.set_num_threads(3)
    check(CODECS[name], x, source, None)


def test_a_native_field_takes_joined_tokens() -> None:
    x = vectors(16, torch.float32)
    for dtype in DTYPES:
        found = [torch.zeros(2, 3, 70, 16, dtype=dtype)]
        encode_cpp(CODECS["native"], x, torch.arange(70).expand(2, 3, -1), None, found)
        assert torch.equal(found[0], x.to(dtype))


def test_others_are_left_to_the_codec() -> None:
    x = vectors(16, torch.float64)
    for name in ("native", "int8"):
        check(CODECS[name], x, some_rows(x), None)


def test_a_row_that_is_not_there_is_refused() -> None:
    x = vectors(16, torch.float32)
    with pytest.raises(RuntimeError, match="row"):
        encode_cpp(CODECS["int8"], x, torch.full((2, 3, 4), 70), None, empty(CODECS["int8"], x, 4))


def test_operator_is_well_formed() -> None:
    x = vectors(16, torch.float32)
    source, centre = some_rows(x), x.mean(2, keepdim=True)
    for number, name in enumerate(("int8", "int4"), 4):
        args = (x, source, centre, number, empty(CODECS[name], x, 90))
        torch.library.opcheck(torch.ops.arkv_cpu.encode.default, args)


# A whole prompt, and a chunk after it.


def prefill(kernel: str, dtype: torch.dtype, padded: bool, chunk: bool) -> LayerState:
    # Keys that are read again are not rotated, so that masses are equal to the bit.
    tiers = (Tier("int8", 20), Tier("k8v4" if chunk else "k4v3", 60))
    plan = LayerPlan(2, 64, 64, dtype, 5, 2, 0, tiers, "combined")
    state = LayerState(plan, 2, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(150)[None] >= torch.tensor([30, 0])[:, None] * padded
    for start, length in ((0, 100), (100, 50))[: 1 + chunk]:
        q, k, v = (
            torch.randn(2, heads, length, 64, generator=generator).to(dtype) for heads in (4, 2, 2)
        )
        mask = make_mask(valid[:, : start + length], length, kind="bool") if padded else None
        torch.ops.arkv.attend(
            q, k, v, mask, state.tensors, plan.to_json(), 0.125, 0.0, None, start == 0, kernel
        )
    return state


def same_state(a: LayerState, b: LayerState) -> None:
    one, two = a.view(), b.view()
    assert torch.equal(one.pos, two.pos), "other tokens"
    for name, stat in one.stats.items():
        assert torch.equal(stat, two.stats[name]), name
    for first, second in zip(one.segments, two.segments, strict=True):
        for (codec, x), (_, y) in zip(first.parts(), second.parts(), strict=True):
            off_by = (codes_of(codec, x) - codes_of(codec, y)).abs()
            assert off_by.max() <= 1, "codes"
            assert (off_by > 0).float().mean() <= RARE, "codes"
            if codec.name not in ("int4", "int3"):
                assert all(torch.equal(*pair) for pair in zip(x, y, strict=True)), "codes"


@pytest.mark.parametrize("chunk", (False, True))
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_is_stored_as_by_the_reference(
    dtype: torch.dtype, padded: bool, chunk: bool
) -> None:
    same_state(prefill("cpp", dtype, padded, chunk), prefill("reference", dtype, padded, chunk))


# Negative controls: the comparison must notice each of these.


def _without_centre(
    codec: Codec, x: Tensor, source: Tensor, centre: Tensor | None, fields: list[Tensor]
) -> None:
    encode_cpp(codec, x, source, None, fields)


def _other_rows(
    codec: Codec, x: Tensor, source: Tensor, centre: Tensor | None, fields: list[Tensor]
) -> None:
    encode_cpp(codec, x, torch.where(source > 0, source - 1, source), centre, fields)


@pytest.mark.parametrize("broken", (_without_centre, _other_rows))
def test_a_broken_encoder_is_noticed(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prefill("reference", torch.float32, True, False)
    monkeypatch.setitem(KERNELS, "cpp", replace(KERNELS["cpp"], encode=broken))
    with pytest.raises(AssertionError, match="codes"):
        same_state(prefill("cpp", torch.float32, True, False), expected)
