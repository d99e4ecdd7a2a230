"""Full precision: the vector as the model made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from arkv_fx.formats.codec import Codec, Field, Unpacked


class Native(Codec):
    """Stores a vector unchanged, in the dtype it comes in."""

    name: ClassVar[str] = "native"
    plain: ClassVar[bool] = True
    triton: ClassVar[str] = "native"
    packing: ClassVar[str] = "value = code"

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        self.check(dim)
        return (Field("codes", dim, native),)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def unpack(self, parts: Sequence[Tensor]) -> Unpacked:
        return Unpacked([parts[0].to(torch.float32)])

    def roundtrip(self, x: Tensor) -> Tensor:
        return x  # float64 would not survive the float32 of the general form
