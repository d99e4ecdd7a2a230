"""``arkv_cpu::encode``: many vectors as codes, picked, centred and packed in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arkv_fx.formats import Codec
from arkv_fx.kernels.cpp.arguments import DTYPES, library, number
from arkv_fx.kernels.cpp.build import load
from arkv_fx.kernels.reference import encode_rows


def encode_cpp(
    codec: Codec, x: Tensor, source: Tensor, centre: Tensor | None, fields: list[Tensor]
) -> None:
    """See ``Encoder``. Equal to ``encode_rows``, but that a rotation may round otherwise.

    What the library does not know (other codecs, dtypes and devices) is left to ``encode_rows``.

    Raises:
        KernelError: without a compiler.
    """
    # Numbers may be held in another dtype than x, which was joined with decoded tokens.
    native = fields[0].dtype if codec.plain else x.dtype
    known = number(codec, native)
    if x.device.type != "cpu" or x.dtype not in DTYPES or known is None:
        return encode_rows(codec, x, source, centre, fields)
    x = x if x.stride(-1) == 1 else x.contiguous()
    if centre is not None:
        centre = centre.contiguous()
    torch.ops.arkv_cpu.encode(x, source.contiguous(), centre, known, fields)


library.define(
    "encode(Tensor x, Tensor source, Tensor? centre, int codec, Tensor(a!)[] fields) -> ()"
)


def _encode(
    x: Tensor, source: Tensor, centre: Tensor | None, codec: int, fields: Sequence[Tensor]
) -> None:
    """Loads the library and runs what takes its place, as for ``attend``.

    Args:
        x: [B, H, T, D] in one of ``DTYPES``, the elements of a vector side by side.
        source: [B, H, C] int64, contiguous, as is centre [B, H, 1, D] float32.
        codec: an index of ``NUMBERS``.
        fields: contiguous [B, H, C, ...] of the codec; updated in place.
    """
    load()
    torch.ops.arkv_cpu.encode(x, source, centre, codec, fields)


def _fake(
    x: Tensor, source: Tensor, centre: Tensor | None, codec: int, fields: Sequence[Tensor]
) -> None:
    return None


library.impl("encode", _encode, "CompositeExplicitAutograd")
torch.library.register_fake("arkv_cpu::encode", _fake, lib=library)
