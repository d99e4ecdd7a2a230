"""3-bit integers, rotated: precise enough for values, not for keys."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from arkv_fx.formats.affine import ExportedAffine, RotatedAffine
from arkv_fx.formats.codec import Codec, CppForm


class Int3(RotatedAffine):
    """Codes 0..7 as three bit planes of D/8 bytes, lowest bit first.

    Bit i of byte j of a plane belongs to element i * D/8 + j, so the eight codes of a byte lie in
    eight contiguous runs and unpacking is eight shifts of whole rows.
    """

    name: ClassVar[str] = "int3"
    bits: ClassVar[int] = 3
    units: ClassVar[tuple[float, ...]] = tuple(2.0**-i for i in range(8))
    multiple: ClassVar[int] = 8
    cpp: ClassVar[CppForm] = CppForm("ByteRow", 7, bits=3, pack="pack_int3")
    triton: ClassVar[str] = "int3"
    packing: ClassVar[str] = (
        "int8 bytes, 128 less, in three planes of D / 8, lowest bit first: bit i of byte j of a "
        "plane is that of element i * D / 8 + j; zero is less 128; value = (code - zero * 7 / 255) "
        "* scale, Hadamard-rotated"
    )

    def pack(self, codes: Tensor) -> Tensor:
        runs = codes.chunk(8, -1)
        planes = []
        for bit in range(3):
            plane = runs[0] >> bit & 1
            for i in range(1, 8):
                plane = plane | (runs[i] >> bit & 1) << i
            planes.append(plane)
        return torch.cat(planes, -1)

    def split(self, packed: Tensor) -> list[Tensor]:
        low, middle, high = packed.to(torch.int32).chunk(3, -1)  # as for int4: not uint8
        middle, high = middle * 2, high * 4
        return [low & 1 << i | middle & 2 << i | high & 4 << i for i in range(8)]

    def exported(self) -> Codec:
        return ExportedInt3()


class ExportedInt3(ExportedAffine, Int3):
    """A bit is what a division by its weight and by twice of it leave."""

    def pack(self, codes: Tensor) -> Tensor:
        left = [codes, (codes / 2).floor(), (codes / 4).floor()]
        bits = [left[0] - left[1] * 2, left[1] - left[2] * 2, left[2]]
        planes = []
        for bit in bits:
            runs = bit.chunk(8, -1)
            planes.append(sum((run * 2**i for i, run in enumerate(runs[1:], 1)), runs[0]))
        return torch.cat(planes, -1)

    def split(self, packed: Tensor) -> list[Tensor]:
        # All runs at once: eight to join are too many for TensorRT to fuse with what reads them.
        run = torch.arange(1, 9, device=packed.device, dtype=torch.float32)[:, None]
        parts = packed.unflatten(-1, (3, 1, -1)) / run.exp2()
        low, middle, high = ((parts - parts.floor()) * 2).floor().unbind(-3)
        return [(low + middle * 2 + high * 4).flatten(-2)]
