"""Rows times int8 weights on a CPU, read as torchao keeps them: ``arkv_cpu::linear_int8``.

A weight is (code - zero point) * scale, with one scale and zero point for each group of a row's
columns, for each row, or for all. ``arkv_cpu::linear_int8_in_float32`` is for many rows where a
processor has no instructions for 16 bits: a part of the weight at a time becomes float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arkv_fx.kernels.cpp.arguments import library
from arkv_fx.kernels.cpp.build import load
from arkv_fx.kernels.cpp.linear_operator import in_parts

library.define(
    "linear_int8(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] zeros, Tensor[] biases)"
    " -> Tensor[]"
)
library.define(
    "linear_int8_in_float32(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias)"
    " -> Tensor"
)
FEW = 16
"""Up to how many rows ``linear_int8`` is the faster, about."""


def dequantized(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The weights [N, K] in float32: what all else here is compared with.

    Args:
        codes: int8 [N, K].
        scales: float [N, groups], or one number in any shape.
        zeros: int8, as many as scales; None: all zero.
    """
    rows = codes.shape[0]
    groups = scales.numel() // rows if scales.numel() > 1 else 1
    shape = (rows, groups, 1) if scales.numel() > 1 else (1, 1, 1)
    out = codes.float().view(rows, groups, -1)
    if zeros is not None:
        out -= zeros.float().view(shape)
    out *= scales.float().view(shape)
    return out.view(codes.shape)


def _linear_int8(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Loads the library and runs what takes its place, as for ``linear``.

    Sums are float32, rounded once, scales, zero points and bias included.

    Args:
        x: [..., K] in float32, bfloat16 or float16.
        codes: contiguous int8 [N, K] each.
        scales: [N, groups] each in one of these dtypes, or one number; groups are the same for all.
        zeros: int8, as many as scales, for each or for none.
        biases: [N] in x's dtype, for each or for none.

    Returns:
        [..., N] for each weight, in x's dtype.
    """
    load()
    out: list[Tensor] = torch.ops.arkv_cpu.linear_int8(x, codes, scales, zeros, biases)
    return out


def _in_float32(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """[..., N] in x's dtype; of the weight a part at a time is held in float32."""
    if x.shape[:-1].numel() <= FEW:
        given = [] if zeros is None else [zeros], [] if bias is None else [bias]
        return _linear_int8(x, [codes], [scales], *given)[0]

    def weight(part: slice) -> Tensor:
        some = (scales, zeros) if scales.numel() == 1 else (
            scales[part], None if zeros is None else zeros[part],
        )  # fmt: skip
        return dequantized(codes[part], *some)

    return in_parts(x, codes.shape[0], weight, bias)


def _fake(x: Tensor, codes: Sequence[Tensor], *rest: object) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in codes]


def _fake_in_float32(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


library.impl("linear_int8", _linear_int8, "CompositeExplicitAutograd")
library.impl("linear_int8_in_float32", _in_float32, "CPU")
torch.library.register_fake("arkv_cpu::linear_int8", _fake, lib=library)
torch.library.register_fake("arkv_cpu::linear_int8_in_float32", _fake_in_float32, lib=library)
