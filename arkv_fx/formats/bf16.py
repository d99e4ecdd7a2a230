"""bfloat16: two bytes an element whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from arkv_fx.formats.codec import Codec, Field, Unpacked


class Bf16(Codec):
    """Stores a vector in bfloat16, which for a bfloat16 model is unchanged."""

    name: ClassVar[str] = "bf16"
    plain: ClassVar[bool] = True
    triton: ClassVar[str] = "bf16"
    packing: ClassVar[str] = "value = code"

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        self.check(dim)
        return (Field("codes", dim, torch.bfloat16),)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.to(torch.bfloat16),)

    def unpack(self, parts: Sequence[Tensor]) -> Unpacked:
        return Unpacked([parts[0].to(torch.float32)])
