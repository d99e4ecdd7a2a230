"""4-bit integers, rotated: half the bytes of int8, and half the error of int4 unrotated."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from arkv_fx.formats.affine import ExportedAffine, RotatedAffine
from arkv_fx.formats.codec import Codec, CppForm


class Int4(RotatedAffine):
    """Codes 0..15, two to a byte: the low nibbles hold the first half of the vector."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    units: ClassVar[tuple[float, ...]] = (1.0, 1 / 16)
    multiple: ClassVar[int] = 2
    cpp: ClassVar[CppForm] = CppForm("ByteRow", 15, bits=4, pack="pack_int4")
    triton: ClassVar[str] = "int4"
    packing: ClassVar[str] = (
        "int8 bytes: 16 * high nibble + low nibble - 128; the low nibbles are the first half of "
        "the vector; zero is less 128; value = (nibble - zero * 15 / 255) * scale, Hadamard-rotated"
    )

    def pack(self, codes: Tensor) -> Tensor:
        first, second = codes.chunk(2, -1)
        return first | second << 4

    def split(self, packed: Tensor) -> list[Tensor]:
        wide = packed.to(torch.int32)  # Inductor does not vectorise bit operations of uint8
        return [wide & 15, wide & 240]

    def split_words(self, words: Tensor) -> tuple[list[Tensor], tuple[float, ...]]:
        # Masked where they lie; the last byte one lower, or a code's top bit would be the sign.
        places = [(words, 0), (words, 8), (words, 16), (words >> 8, 16)]
        runs = [word & mask << place for mask in (15, 240) for word, place in places]
        units = [unit * 2.0**-place for unit in self.units for _, place in places]
        return [run.to(torch.float32) for run in runs], tuple(units)

    def exported(self) -> Codec:
        return ExportedInt4()


class ExportedInt4(ExportedAffine, Int4):
    """16 * second half + first half."""

    def pack(self, codes: Tensor) -> Tensor:
        first, second = codes.chunk(2, -1)
        return first + second * 16

    def split(self, packed: Tensor) -> list[Tensor]:
        second = (packed / 16).floor()
        return [packed - second * 16, second]
