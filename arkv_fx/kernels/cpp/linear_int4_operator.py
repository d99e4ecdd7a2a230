"""Rows times packed int4 weights on a CPU: ``arkv_cpu::linear_int4``.

Weights are read as torchao's ``Int4OpaqueTensor`` keeps them for torch's own
``_weight_int4pack_mm_for_cpu``: a weight is (code - 8) * scale + the value of code 8, of each group
of a row's columns. How codes lie hangs on the processor that packed them, and the tensor does not
say: ``layout`` asks torch how it packs here. ``arkv_cpu::linear_int4_many`` is for many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from arkv_fx.kernels.cpp.arguments import library
from arkv_fx.kernels.cpp.build import load
from arkv_fx.kernels.cpp.linear_operator import in_parts, multiplied_by_torch

library.define(
    "linear_int4(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] biases, int block,"
    " bool halves) -> Tensor[]"
)
library.define(
    "linear_int4_many(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int block, bool halves)"
    " -> Tensor"
)
library.define(
    "unpack_int4(Tensor(a!) out, Tensor codes, Tensor scales, int first, int block, bool halves)"
    " -> ()"
)
FEW = 128
"""Up to how many rows ``linear_int4`` is the faster: unpacking costs as much as many rows."""
LAYOUTS = ((64, True), (32, True), (32, False))
"""Rows of a block, and whether low nibbles are its first half: AVX-512, AVX2, neither."""


def packed(codes: Tensor, block: int, halves: bool) -> Tensor:
    """Codes 0 to 15 [N, K] as bytes [N, K / 2] in a layout; N and K are even."""
    blocks = []
    for some in codes.split(block):
        if halves and len(some) == block:
            low, high = some.chunk(2)
        else:
            low, high = some[::2], some[1::2]
        blocks.append((low | high << 4).t().reshape(-1))
    return torch.cat(blocks).to(torch.uint8).view(len(codes), -1)


def unpacked(codes: Tensor, block: int, halves: bool) -> Tensor:
    """What ``packed`` packed: uint8 [N, K]."""
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    whole = rows // block * block
    found = []
    for some, n in ((codes[:whole], block), (codes[whole:], rows - whole)):
        if len(some) == 0:
            continue
        lie = some.reshape(-1, columns, n // 2).transpose(1, 2)  # [blocks, n / 2, K]
        both = (lie & 15, lie >> 4)
        joined = torch.cat(both, 1) if halves and n == block else torch.stack(both, 2).flatten(1, 2)
        found.append(joined.reshape(-1, columns))
    return torch.cat(found)


@cache
def layout() -> tuple[int, bool] | None:
    """Which of ``LAYOUTS`` torch packs in on this machine; None: in another one."""
    codes = torch.randint(0, 16, (112, 4), generator=torch.Generator().manual_seed(0))
    try:
        found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    except (RuntimeError, AttributeError):
        return None
    return next((known for known in LAYOUTS if torch.equal(packed(codes, *known), found)), None)


def dequantized(codes: Tensor, scales: Tensor, block: int, halves: bool) -> Tensor:
    """The weights [N, K] in float32: what all else here is compared with.

    Args:
        codes: uint8 [N, K / 2] as ``packed`` has them.
        scales: float [groups, N, 2], scales and values of code 8.
    """
    plain = unpacked(codes, block, halves)
    scale, eight = scales.float().permute(2, 1, 0).unsqueeze(-1)  # [N, groups, 1] each
    out = plain.float().view(len(plain), scale.shape[1], -1)
    return torch.addcmul(eight - 8 * scale, out, scale, out=out).view(plain.shape)


def _linear_int4(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    block: int, halves: bool,
) -> list[Tensor]:  # fmt: skip
    """Loads the library and runs what takes its place, as for ``linear``.

    Sums are float32, rounded once, scales and bias included.

    Args:
        x: [..., K] in float32, bfloat16 or float16.
        codes: contiguous uint8 [N, K / 2] each, packed as ``block`` and ``halves`` say.
        scales: [groups, N, 2] each in one of these dtypes, of as many groups for all.
        biases: [N] in x's dtype, for each or for none.

    Returns:
        [..., N] for each weight, in x's dtype.
    """
    load()
    out: list[Tensor] = torch.ops.arkv_cpu.linear_int4(x, codes, scales, biases, block, halves)
    return out


def _many(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, block: int, halves: bool
) -> Tensor:
    """[..., N] in x's dtype; a part of the weight at a time is held in what torch multiplies."""
    if x.shape[:-1].numel() <= FEW:
        biases = [] if bias is None else [bias]
        return _linear_int4(x, [codes], [scales], biases, block, halves)[0]
    load()
    dtype = x.dtype if multiplied_by_torch(x.dtype) else torch.float32

    def weight(part: slice) -> Tensor:
        rows = min(part.stop, codes.shape[0]) - part.start
        out = x.new_empty((rows, x.shape[-1]), dtype=dtype)
        torch.ops.arkv_cpu.unpack_int4(out, codes, scales, part.start, block, halves)
        return out

    return in_parts(x, codes.shape[0], weight, bias, step=block, dtype=dtype)


def _fake(x: Tensor, codes: Sequence[Tensor], *rest: object) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in codes]


def _fake_many(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


library.impl("linear_int4", _linear_int4, "CompositeExplicitAutograd")
library.impl("linear_int4_many", _many, "CPU")
torch.library.register_fake("arkv_cpu::linear_int4", _fake, lib=library)
torch.library.register_fake("arkv_cpu::linear_int4_many", _fake_many, lib=library)
