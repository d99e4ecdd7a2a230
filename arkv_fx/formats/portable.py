"""Formats whose tensors every runtime can hand over: bfloat16 and float8 as the bytes they are.

numpy has neither, and bindings of ONNX Runtime take neither (onnxruntime-node and -web open no such
graph), so graphs for them hold an int8 tensor that is wider: the same memory, and as many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arkv_fx.formats.codec import Field, WrappedCodec
from arkv_fx.runtime.operators import from_bytes, to_bytes

STRANGE = (torch.bfloat16, torch.float8_e4m3fn)


def held_as(dtype: torch.dtype, width: int) -> tuple[torch.dtype, int]:
    """Dtype and width of the tensor that holds rows of ``width`` numbers of ``dtype``."""
    return (torch.int8, width * dtype.itemsize) if dtype in STRANGE else (dtype, width)


@dataclass(frozen=True)
class PortableCodec(WrappedCodec):
    """An exported codec whose fields of strange dtypes are bytes.

    ``native`` is the model's dtype. Numbers that the caller has already made of the bytes are taken
    as they are.
    """

    native: torch.dtype

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        held = ((f, held_as(f.dtype, f.width)) for f in self.codec.fields(dim, native))
        return tuple(replace(f, dtype=dtype, width=width) for f, (dtype, width) in held)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = zip(self.codec.encode(x), self._kinds(), strict=True)
        return tuple(to_bytes(p.to(kind)) if kind in STRANGE else p for p, kind in parts)

    def opened(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [
            from_bytes(p, kind) if kind in STRANGE and p.dtype == torch.int8 else p
            for p, kind in zip(parts, self._kinds(), strict=True)
        ]

    def _kinds(self) -> list[torch.dtype]:
        return [f.dtype for f in self.codec.fields(self.codec.multiple, self.native)]
