"""8-bit floats: the paper's format (ARKV, arXiv 2603.08727)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from arkv_fx.formats.codec import (
    SCALE_DTYPE,
    Codec,
    CppForm,
    Field,
    Unpacked,
    stored_scale,
    symmetric_scale,
    top_bytes,
)
from arkv_fx.runtime.operators import dequantize, to_e4m3

TOP = 448.0  # the largest e4m3 number
BIAS = 2.0**120  # what codes with their bits in the places of a float32's are too small by


class Fp8(Codec):
    """e4m3 codes with one scale, absmax / 448, per vector."""

    name: ClassVar[str] = "fp8"
    cpp: ClassVar[CppForm] = CppForm("FP8Row", 448, integers=False)
    triton: ClassVar[str] = "fp8"
    packing: ClassVar[str] = "float8 e4m3fn; value = code * scale"

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        self.check(dim)
        # Held as bytes: gathers, scatters and selects of float8 are missing here and there.
        return Field("codes", dim, torch.uint8), Field("scale", 1, SCALE_DTYPE)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(torch.float32)
        scale = symmetric_scale(x, TOP)
        # The cast makes NaN of what is too large, and a scale rounded down makes such values.
        codes = (x / scale).clamp(-TOP, TOP)
        return codes.to(torch.float8_e4m3fn).view(torch.uint8), scale.to(SCALE_DTYPE)

    def unpack(self, parts: Sequence[Tensor]) -> Unpacked:
        codes, scale = parts
        bits = codes.view(torch.int8).to(torch.int32) << 20
        return Unpacked([_as_float32(bits)], (BIAS,), scale.to(torch.float32))

    def split_words(self, words: Tensor) -> tuple[list[Tensor], tuple[float, ...]]:
        return [_as_float32(byte >> 4) for byte in top_bytes(words)], (BIAS,) * 4

    def exported(self) -> Codec:
        return ExportedFp8()


class ExportedFp8(Fp8):
    """e4m3 codes in torch's own dtype."""

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        return Field("codes", dim, torch.float8_e4m3fn), Field("scale", 1, SCALE_DTYPE)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(torch.float32)
        stored, scale = stored_scale(x.abs().amax(-1, keepdim=True) / TOP)
        return to_e4m3((x / scale).clamp(-TOP, TOP)), stored

    def decode(self, parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        return dequantize(parts[0], parts[1].to(torch.float32)).to(dtype)


def _as_float32(bits: Tensor) -> Tensor:
    """The numbers times 2^-120 of codes whose exponents begin at bit 23; exact, subnormals too.

    On the bits, since the library's conversion is slow: sign, exponent and mantissa in their
    float32 places.
    """
    return (bits & -0x78100000).view(torch.float32)
