"""Storing codes by selection instead of scatter, for graphs that leave torch.

TensorRT fuses a `where` with what reads and writes it; a scatter into quantized codes it does not
build at all.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from arkv_fx.formats import Codec
from arkv_fx.kernels.kernel import Kernel, Writer
from arkv_fx.kernels.reference import attend_columns, gather
from arkv_fx.runtime.operators import to_e4m3, widen


def encode_empty(
    codec: Codec, x: Tensor, source: Tensor, centre: Tensor | None, fields: list[Tensor]
) -> None:
    """See ``Encoder``; for a prompt, before which all slots are empty and so all fields zero.

    Zeros of a storage dtype would be constants of the graph, which TensorRT does not take.
    """
    x = gather(x, source.clamp(min=0))
    taken = source[..., None] >= 0
    for field, code in zip(fields, _codes(codec, x, centre, fields), strict=True):
        if field.dtype == torch.float8_e4m3fn:
            field.copy_(to_e4m3(torch.where(taken, widen(code), 0.0)))
        else:
            plain = torch.float32 if field.dtype.is_floating_point else torch.int32
            field.copy_(torch.where(taken, code.to(plain), 0).to(field.dtype))


def store_vector(
    codec: Codec, x: Tensor, source: Tensor, centre: Tensor | None, fields: list[Tensor]
) -> None:
    """See ``Encoder``; the code of a single vector is made once and offered to every slot."""
    for field, code in zip(fields, _codes(codec, x, centre, fields), strict=True):
        field.copy_(_select(source[..., None] >= 0, code, field))


def _codes(codec: Codec, x: Tensor, centre: Tensor | None, fields: list[Tensor]) -> list[Tensor]:
    if centre is not None:
        x = x.float() - centre
    return [c.to(f.dtype) for f, c in zip(fields, codec.encode(x), strict=True)]


def take_slot(field: Tensor, slot: Tensor) -> Tensor:
    """One row [B, Hkv, 1, W] of a storage tensor [B, Hkv, C, W] for each head; slot [B, Hkv]."""
    if field.dtype == torch.float8_e4m3fn:  # cannot be gathered, but its numbers can
        return to_e4m3(gather(widen(field), slot[..., None]))
    return gather(field, slot[..., None])


def _select(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where ``taken``; by way of float32, exactly, in dtypes that cannot be selected."""
    if old.dtype == torch.bfloat16:
        return torch.where(taken, new.float(), old.float()).to(old.dtype)
    if old.dtype == torch.float8_e4m3fn:
        return to_e4m3(torch.where(taken, widen(new), widen(old)))
    return torch.where(taken, new, old)


_WRITER = Writer(take_slot, store_vector)
# For graphs that leave torch alone, so never taken unasked.
KERNEL = Kernel("export", attend_columns, encode=encode_empty, writer=_WRITER)
SUMS = Kernel(
    "export_sums", partial(attend_columns, sums=True), encode=encode_empty, writer=_WRITER
)
