"""3-bit integers, rotated: precise enough for values, not for keys."""

from typing import ClassVar

import torch
from torch import Tensor

from arkv_fx.formats.affine import RotatedAffine


class Int3(RotatedAffine):
    """Codes 0..7 as three bit planes of D/8 bytes, lowest bit first.

    Bit i of byte j of a plane belongs to element i * D/8 + j, so the eight codes of a byte lie in
    eight contiguous runs and unpacking is eight shifts of whole rows.
    """

    name: ClassVar[str] = "int3"
    bits: ClassVar[int] = 3
    units: ClassVar[tuple[float, ...]] = tuple(2.0**-i for i in range(8))
    multiple: ClassVar[int] = 8

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
