"""Rows times int8 and packed int4 weights in C++ against float64 over the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arkv_fx.kernels.cpp import available, linear_int4_operator, linear_int8_operator

reason = available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)
# Half of the last bit that a dtype holds, relative, for the one rounding; float32 rounds every sum.
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = st.sampled_from(list(ROUNDING))
OPS = torch.ops.arkv_cpu


def fits(found: Tensor, x: Tensor, weight: Tensor, most: Tensor, bias: Tensor | None) -> bool:
    """Whether ``found`` is x @ weight + bias; ``most`` [N, K] is what a weight's terms are at most,
    for those that cancel: of a zero point and of codes."""
    wide = None if bias is None else bias.double()
    expected = torch.nn.functional.linear(x.double(), weight.double(), wide)
    scale = torch.nn.functional.linear(
        x.double().abs(), most.double(), None if wide is None else wide.abs()
    )
    assert found.dtype == x.dtype and found.shape == expected.shape
    return bool(((found.double() - expected).abs() <= ROUNDING[x.dtype] * scale + 1e-7).all())


def draw_int8(
    dtype: torch.dtype, scales: torch.dtype, rows: int, size: int, group: int, groups: int,
    zeros: bool, one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    x = torch.randn(rows, group * groups).to(dtype)
    codes = torch.randint(-128, 128, (size, group * groups)).to(torch.int8)
    scale = torch.rand(1, 1) if one else torch.rand(size, groups)
    zero = torch.randint(-128, 128, scale.shape).to(torch.int8) if zeros else None
    return x, codes, scale.to(scales), zero


@given(
    dtype=DTYPES, scales=DTYPES, rows=st.integers(1, 9), size=st.integers(1, 40),
    group=st.integers(1, 70), groups=st.integers(1, 4), zeros=st.booleans(), one=st.booleans(),
    biased=st.booleans(), threads=st.integers(1, 2),
)  # fmt: skip
def test_int8(
    dtype: torch.dtype, scales: torch.dtype, rows: int, size: int, group: int, groups: int,
    zeros: bool, one: bool, biased: bool, threads: int,
) -> None:  # fmt: skip
    """A scale for each group, for each row or for all; two weights in one call."""
    torch.manual_seed(rows + size + group)
    groups = 1 if one else groups
    x, codes, scale, zero = draw_int8(dtype, scales, rows, size, group, groups, zeros, one)
    bias = torch.randn(size).to(dtype) if biased else None
    torch.set_num_threads(threads)
    try:
        found = OPS.linear_int8(
            x, [codes] * 2, [scale] * 2, [] if zero is None else [zero] * 2,
            [] if bias is None else [bias] * 2,
        )  # fmt: skip
    finally:
        torch.set_num_threads(1)
    weight = linear_int8_operator.dequantized(codes, scale, zero)
    most = 256 * scale.float().max() * torch.ones_like(weight)
    assert torch.equal(*found) and fits(found[0], x, weight, most, bias)
    many = OPS.linear_int8_in_float32(torch.cat([x] * 20), codes, scale, zero, bias)
    assert fits(many[:rows], x, weight, most, bias)


@given(
    dtype=DTYPES, scales=DTYPES, rows=st.integers(1, 9), pairs=st.integers(1, 70),
    group=st.integers(1, 35), groups=st.integers(1, 4), biased=st.booleans(),
    lies=st.sampled_from(linear_int4_operator.LAYOUTS), part=st.sampled_from([1, 1 << 22]),
)  # fmt: skip
def test_int4(
    dtype: torch.dtype, scales: torch.dtype, rows: int, pairs: int, group: int, groups: int,
    biased: bool, lies: tuple[int, bool], part: int,
) -> None:  # fmt: skip
    """In each of torch's layouts, with blocks that are not whole."""
    torch.manual_seed(rows + pairs + group)
    size, width = 2 * pairs, 2 * group * groups
    x, plain = torch.randn(rows, width).to(dtype), torch.randint(0, 16, (size, width))
    codes = linear_int4_operator.packed(plain, *lies)
    assert torch.equal(linear_int4_operator.unpacked(codes, *lies), plain.to(torch.uint8))
    scale = torch.rand(groups, size, 2).to(scales)
    bias = torch.randn(size).to(dtype) if biased else None
    biases = [] if bias is None else [bias]
    weight = linear_int4_operator.dequantized(codes, scale, *lies)
    most = 24 * scale.float().max() * torch.ones_like(weight)
    found = OPS.linear_int4(x, [codes], [scale], biases, *lies)[0]
    assert fits(found, x, weight, most, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arkv_fx.kernels.cpp.linear_operator.PART", part)
        patch.setattr(linear_int4_operator, "FEW", 0)
        many = OPS.linear_int4_many(x, codes, scale, bias, *lies)
    # What torch multiplies in 16 bits is rounded to them first.
    rounded = weight.to(dtype) if linear_int4_operator.multiplied_by_torch(dtype) else weight
    assert fits(many, x, rounded.float(), most, bias)


def test_a_wrong_scale_or_layout_is_seen() -> None:
    x, codes = torch.randn(2, 64), torch.randint(0, 256, (64, 32), dtype=torch.uint8)
    scale = torch.rand(2, 64, 2)
    weight = linear_int4_operator.dequantized(codes, scale, 64, True)
    most = 24 * torch.ones_like(weight)
    wrong = scale.clone()
    wrong[1, 3, 0] *= 1.01
    for given_scale, lies, right in ((scale, (64, True), True), (wrong, (64, True), False),
                                     (scale, (32, True), False)):  # fmt: skip
        found = OPS.linear_int4(x, [codes], [given_scale], [], *lies)[0]
        assert fits(found, x, weight, most, None) == right
    plain = torch.randint(-127, 128, (9, 64)).to(torch.int8)
    eight = linear_int8_operator.dequantized(plain, one := torch.rand(9, 2), None)
    wide = 128 * torch.ones_like(eight)
    assert fits(OPS.linear_int8(x, [plain], [one], [], [])[0], x, eight, wide, None)
    one[4, 1] *= 1.01
    assert not fits(OPS.linear_int8(x, [plain], [one], [], [])[0], x, eight, wide, None)


def test_torch_packs_in_a_known_layout() -> None:
    """The one that is asked for is the one that ``_weight_int4pack_mm_for_cpu`` reads."""
    lies = linear_int4_operator.layout()
    assert lies in linear_int4_operator.LAYOUTS
    plain = torch.randint(0, 16, (112, 64), dtype=torch.int32)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(plain, 1)
    scale, x = torch.rand(2, 112, 2), torch.randn(3, 64)
    theirs = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, 32, scale)
    ours = OPS.linear_int4(x, [codes], [scale], [], *lies)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


CODES, SCALES = torch.zeros(4, 6, dtype=torch.int8), torch.ones(4, 2)
PACKED, PAIRS = torch.zeros(4, 3, dtype=torch.uint8), torch.ones(2, 4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.linear_int8(torch.ones(1, 5), [CODES], [SCALES], [], []), "divide|wide"),
        (lambda: OPS.linear_int8(torch.ones(1, 6), [CODES], [SCALES[:3]], [], []), "rows"),
        (lambda: OPS.linear_int8(torch.ones(1, 6), [CODES.float()], [SCALES], [], []), "int8"),
        (lambda: OPS.linear_int8(torch.ones(1, 6), [CODES], [SCALES], [CODES], []), "zero points"),
        (lambda: OPS.linear_int8(torch.ones(1, 6), [CODES] * 2, [SCALES], [], []), "for each"),
        (lambda: OPS.linear_int8(torch.ones(1, 6).double(), [CODES], [SCALES], [], []), "float16"),
        (lambda: OPS.linear_int4(torch.ones(1, 8), [PACKED], [PAIRS], [], 64, True), "half"),
        (lambda: OPS.linear_int4(torch.ones(1, 6), [PACKED], [PAIRS[:, 1:]], [], 64, True), "rows"),
        (lambda: OPS.linear_int4(torch.ones(1, 6), [PACKED], [PAIRS], [], 128, True), "blocks"),
        (lambda: OPS.linear_int4(torch.ones(1, 6), [CODES], [PAIRS], [], 64, True), "bytes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()  # type: ignore[operator]
