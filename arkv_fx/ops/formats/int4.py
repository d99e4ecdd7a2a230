"""4-bit integers, rotated: half the bytes of int8, and half the error of int4 unrotated."""

from typing import ClassVar

import torch
from torch import Tensor

from arkv_fx.ops.formats.affine import RotatedAffine


class Int4(RotatedAffine):
    """Codes 0..15, two to a byte: the low nibbles hold the first half of the vector."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    units: ClassVar[tuple[float, ...]] = (1.0, 1 / 16)
    multiple: ClassVar[int] = 2

    def pack(self, codes: Tensor) -> Tensor:
        first, second = codes.chunk(2, -1)
        return first | second << 4

    def split(self, packed: Tensor) -> list[Tensor]:
        wide = packed.to(torch.int32)  # Inductor does not vectorise bit operations of uint8
        return [wide & 15, wide & 240]
