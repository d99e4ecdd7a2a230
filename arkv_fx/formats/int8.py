"""8-bit integers: three to five times less error than fp8 in the same bytes."""

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
from arkv_fx.runtime.operators import dequantize

TOP = 127.0


class Int8(Codec):
    """Symmetric codes -127..127 with one scale, absmax / 127, per vector."""

    name: ClassVar[str] = "int8"
    cpp: ClassVar[CppForm] = CppForm("ByteRow", 127)
    triton: ClassVar[str] = "int8"
    packing: ClassVar[str] = "value = code * scale"
    centred: ClassVar[bool] = True

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        self.check(dim)
        return Field("codes", dim, torch.int8), Field("scale", 1, SCALE_DTYPE)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(torch.float32)
        scale = symmetric_scale(x, TOP)
        # The clamp is for a scale that was rounded down: absmax / scale may be just above 127.5.
        codes = (x / scale).round().clamp(-TOP, TOP)
        return codes.to(torch.int8), scale.to(SCALE_DTYPE)

    def unpack(self, parts: Sequence[Tensor]) -> Unpacked:
        codes, scale = parts
        return Unpacked([codes.to(torch.float32)], scale=scale.to(torch.float32))

    def split_words(self, words: Tensor) -> tuple[list[Tensor], tuple[float, ...]]:
        # From the top of a word, the sign is right.
        return [byte.to(torch.float32) for byte in top_bytes(words)], (2.0**-24,) * 4

    def exported(self) -> Codec:
        return ExportedInt8()


class ExportedInt8(Int8):
    """int8 by one dequantization."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(torch.float32)
        stored, scale = stored_scale(x.abs().amax(-1, keepdim=True) / TOP)
        return (x / scale).round().clamp(-TOP, TOP).to(torch.int8), stored

    def decode(self, parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        return dequantize(parts[0], parts[1].to(torch.float32)).to(dtype)
