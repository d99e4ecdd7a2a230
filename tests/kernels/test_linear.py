"""Rows times weights in C++ against float64, and products of 16 bits by way of float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arkv_fx.kernels.cpp import available, linear_operator

reason = available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)
# Half of the last bit that a dtype holds, relative, for the one rounding; float32 rounds every sum.
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = st.sampled_from(list(ROUNDING))


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = None if bias is None else bias.double()
    return torch.nn.functional.linear(x.double(), weight.double(), wide)


def check(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expected = exact(x, weight, bias)
    # What the sums' terms are together, for those that cancel.
    scale = exact(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert ((found.double() - expected).abs() <= ROUNDING[x.dtype] * scale + 1e-7).all()


@given(
    dtype=DTYPES, rows=st.integers(1, 9), width=st.integers(1, 130),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3), biased=st.booleans(),
    leading=st.integers(0, 2), threads=st.integers(1, 2),
)  # fmt: skip
def test_few_rows(
    dtype: torch.dtype, rows: int, width: int, sizes: list[int], biased: bool, leading: int,
    threads: int,
) -> None:  # fmt: skip
    torch.manual_seed(rows + width)
    x = torch.randn(*[1] * leading, rows, width).to(dtype)
    weights = [torch.randn(size, width).to(dtype) for size in sizes]
    biases = [torch.randn(size).to(dtype) for size in sizes] if biased else []
    torch.set_num_threads(threads)
    try:
        found = torch.ops.arkv_cpu.linear(x, weights, biases)
    finally:
        torch.set_num_threads(1)
    assert len(found) == len(sizes)
    for out, weight, bias in zip(found, weights, biases or [None] * len(sizes), strict=True):
        check(out, x, weight, bias)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_threads_share_weights_of_any_size(dtype: torch.dtype) -> None:
    x = torch.randn(2, 1024).to(dtype)
    weights = [torch.randn(size, 1024).to(dtype) for size in (1500, 3, 700)]
    alone = torch.ops.arkv_cpu.linear(x, weights, [])
    torch.set_num_threads(2)
    try:
        shared = torch.ops.arkv_cpu.linear(x, weights, [])
    finally:
        torch.set_num_threads(1)
    for one, other, weight in zip(alone, shared, weights, strict=True):
        assert torch.equal(one, other)
        check(one, x, weight, None)


def test_rows_of_any_strides() -> None:
    x = torch.randn(40, 3).t()
    check(torch.ops.arkv_cpu.linear(x, [w := torch.randn(5, 40)], [])[0], x, w, None)


def test_rows_of_nothing_are_their_bias() -> None:
    found = torch.ops.arkv_cpu.linear(torch.ones(3, 0), [torch.ones(9, 0)], [b := torch.randn(9)])
    assert torch.equal(found[0], b.expand(3, 9))


def test_numbers_that_are_none_come_out_as_such() -> None:
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [1.0, 1.0]])
    found = torch.ops.arkv_cpu.linear(x, [torch.ones(3, 2)], [])[0]
    assert found[0].isnan().all() and found[1].isinf().all() and found[2].eq(2).all()


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.ones(3, 4), None, "width"),
        (torch.ones(3, 5, dtype=torch.bfloat16), None, "dtype"),
        (torch.ones(5, 3).t(), None, "contiguous"),
        (torch.ones(3, 5), torch.ones(4), "bias"),
    ],
)
def test_what_does_not_fit_is_refused(weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.arkv_cpu.linear(torch.ones(1, 5), [weight], [] if bias is None else [bias])


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]), rows=st.integers(1, 70),
    width=st.integers(1, 70), size=st.integers(1, 300), biased=st.booleans(),
    part=st.sampled_from([1, 5000, 1 << 22]),
)  # fmt: skip
def test_many_rows_in_float32(
    dtype: torch.dtype, rows: int, width: int, size: int, biased: bool, part: int
) -> None:
    """Whatever is held at once, down to the least."""
    torch.manual_seed(rows + width + size)
    x, weight = torch.randn(2, rows, width).to(dtype), torch.randn(size, width).to(dtype)
    bias = torch.randn(size).to(dtype) if biased else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_operator, "PART", part)
        found = torch.ops.arkv_cpu.linear_in_float32(x, weight, bias)
    check(found, x, weight, bias)
