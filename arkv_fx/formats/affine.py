"""What int4 and int3 share: (codes - zero) * scale in a rotated basis, packed into bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from arkv_fx.formats.codec import (
    BYTE_SHIFT,
    SCALE_DTYPE,
    TINY_SCALE,
    Codec,
    Field,
    Unpacked,
    round_to_scale_dtype,
    signed,
    stored_scale,
)
from arkv_fx.formats.hadamard import rotate
from arkv_fx.runtime.operators import widen


class RotatedAffine(Codec):
    """Unsigned codes of `bits` bits, one scale and zero per vector, after a Hadamard rotation."""

    bits: ClassVar[int]
    units: ClassVar[tuple[float, ...]]
    centred: ClassVar[bool] = True

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Codes `[..., D]` (uint8, below 2^bits) in bytes `[..., D * bits / 8]`."""

    @abstractmethod
    def split(self, packed: Tensor) -> list[Tensor]:
        """The inverse of `pack`: runs `[..., D / n]` of codes, int32, in order, in `units`."""

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        self.check(dim)
        return (
            Field("codes", dim * self.bits // 8, torch.uint8),
            Field("scale", 1, SCALE_DTYPE),
            Field("zero", 1, torch.uint8),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.to_stored(x.to(torch.float32))
        low, high = x.aminmax(dim=-1, keepdim=True)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # so that the zero lies in the span
        top = 2**self.bits - 1
        scale = round_to_scale_dtype(((high - low) / top).clamp_min(TINY_SCALE))
        zero = (-low / scale / self._unit()).round().clamp(0, 255)
        codes = (x / scale + zero * self._unit()).round().clamp(0, top).to(torch.uint8)
        return self.pack(codes), scale.to(SCALE_DTYPE), zero.to(torch.uint8)

    def unpack(self, parts: Sequence[Tensor]) -> Unpacked:
        packed, scale, zero = parts
        runs = [run.to(torch.float32) for run in self.split(packed)]
        zero = zero.to(torch.float32) * self._unit()
        return Unpacked(runs, self.units, scale.to(torch.float32), zero)

    def _unit(self) -> float:
        """Codes per unit of the stored zero: a byte spans them all, in steps far below a code."""
        return int(2**self.bits - 1) / 255

    def to_stored(self, x: Tensor) -> Tensor:
        return rotate(x).to(x.dtype)

    def from_stored(self, x: Tensor) -> Tensor:
        return rotate(x).to(x.dtype)


class ExportedAffine(RotatedAffine):
    """Packed codes and zeros in signed bytes, 128 less; packing and splitting are arithmetic."""

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        return signed(super().fields(dim, native))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.to_stored(x.to(torch.float32))
        low = x.amin(-1, keepdim=True).clamp(max=0.0)
        high = x.amax(-1, keepdim=True).clamp(min=0.0)
        top = 2**self.bits - 1
        stored, scale = stored_scale((high - low) / top)
        zero = (-low / scale / self._unit()).round().clamp(0, 255)
        codes = (x / scale + zero * self._unit()).round().clamp(0, top)
        shifted = (self.pack(codes) - BYTE_SHIFT).to(torch.int8)
        return shifted, stored, (zero - BYTE_SHIFT).to(torch.int8)

    def decode(self, parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        packed, scale, zero = parts
        runs = self.split(widen(packed) + BYTE_SHIFT)
        codes = torch.cat(runs, -1) if len(runs) > 1 else runs[0]
        offset = (zero.to(torch.float32) + BYTE_SHIFT) * self._unit()
        return ((codes - offset) * scale.to(torch.float32)).to(dtype)
