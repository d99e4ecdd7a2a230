"""Rows times weights on a CPU, where torch has nothing fast: few rows, or 16 bits without
instructions for them.

``arkv_cpu::linear`` multiplies a few rows with one or several weights, as they lie, each read once:
torch's own products of one row read memory at a third to a half of its speed.
``arkv_cpu::linear_in_float32`` is for many rows of 16 bits: where a processor has no instructions
for their products, torch's take six times as long as the same in float32, casts included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arkv_fx.kernels.cpp.arguments import library
from arkv_fx.kernels.cpp.build import load

PART = 1 << 22
"""Elements of a weight, or of its product, that are held in float32 at once."""

library.define("linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]")
library.define("linear_in_float32(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def few_rows(dtype: torch.dtype) -> int:
    """Up to how many rows ``linear`` is the faster."""
    return 4 if multiplied_by_torch(dtype) else 16


def multiplied_by_torch(dtype: torch.dtype) -> bool:
    """Whether torch has fast products of many rows of ``dtype`` on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return True  # other builds have other products, which nobody has compared
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def _linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Loads the library and runs what takes its place, as for ``attend``.

    Sums are float32, rounded once, bias included.

    Args:
        x: [..., K] in float32, bfloat16 or float16.
        weights: contiguous [N, K] each, of x's dtype.
        biases: one [N] for each, or none at all.

    Returns:
        [..., N] for each weight.
    """
    load()
    out: list[Tensor] = torch.ops.arkv_cpu.linear(x, weights, biases)
    return out


def _linear_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., N] in x's dtype; of the weight a part at a time is held in float32."""
    rows = x.flatten(0, -2)
    if len(rows) <= few_rows(x.dtype):
        return _linear(x, [weight], [] if bias is None else [bias])[0]
    return in_parts(x, weight.shape[0], lambda part: weight[part].float(), bias)


def in_parts(
    x: Tensor, size: int, weight: Callable[[slice], Tensor], bias: Tensor | None, step: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Products of x [..., K] with ``size`` rows of a weight that ``weight`` makes in ``dtype``.

    It is asked for a part of them at a time, of whole ``step`` unless it is the last.
    """
    rows, out = x.flatten(0, -2).to(dtype), x.new_empty((*x.shape[:-1], size))
    length = max(64, PART // max(rows.shape)) // step * step or step
    for start in range(0, size, length):
        part = slice(start, start + length)
        own = None if bias is None else bias[part].to(dtype)
        out.flatten(0, -2)[:, part] = torch.nn.functional.linear(rows, weight(part), own)
    return out


def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _fake_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


library.impl("linear", _linear, "CompositeExplicitAutograd")
library.impl("linear_in_float32", _linear_in_float32, "CPU")
torch.library.register_fake("arkv_cpu::linear", _fake, lib=library)
torch.library.register_fake("arkv_cpu::linear_in_float32", _fake_in_float32, lib=library)
