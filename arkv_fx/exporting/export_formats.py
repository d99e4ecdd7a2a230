"""Storage formats as graphs outside of torch can compute them: the same bytes, other arithmetic.

ONNX and TensorRT know no bit operations on codes and no unsigned selection. So unsigned bytes
become int8 (less 128), bits are found by division, e4m3 is a dtype of its own, and codes are read
by the operators of ``arkv_fx.kernels.codes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from arkv_fx.errors import ExportError
from arkv_fx.formats import Codec, Field, Format, get_format
from arkv_fx.formats.affine import RotatedAffine
from arkv_fx.formats.bf16 import Bf16
from arkv_fx.formats.codec import SCALE_DTYPE, TINY_SCALE
from arkv_fx.formats.fp8 import Fp8
from arkv_fx.formats.hadamard import block, hadamard
from arkv_fx.formats.int3 import Int3
from arkv_fx.formats.int4 import Int4
from arkv_fx.formats.int8 import Int8
from arkv_fx.formats.native import Native
from arkv_fx.kernels.codes import dequantize, to_e4m3, widen
from arkv_fx.plan import LayerPlan

SHIFT = 128  # an unsigned byte less this is an int8


def _scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """A scale as it is stored, and the float32 number that this is."""
    stored = x.clamp_min(TINY_SCALE).to(SCALE_DTYPE)
    return stored, stored.to(torch.float32)


class ExportedInt8(Int8):
    """int8 by one dequantization."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(torch.float32)
        stored, scale = _scale(x.abs().amax(-1, keepdim=True) / 127.0)
        return (x / scale).round().clamp(-127.0, 127.0).to(torch.int8), stored

    def decode(self, parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        return dequantize(parts[0], parts[1].to(torch.float32)).to(dtype)


class ExportedFp8(Fp8):
    """e4m3 codes in torch's own dtype."""

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        return Field("codes", dim, torch.float8_e4m3fn), Field("scale", 1, SCALE_DTYPE)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(torch.float32)
        stored, scale = _scale(x.abs().amax(-1, keepdim=True) / 448.0)
        return to_e4m3((x / scale).clamp(-448.0, 448.0)), stored

    def decode(self, parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        return dequantize(parts[0], parts[1].to(torch.float32)).to(dtype)


class _ExportedAffine(RotatedAffine):
    """Packed codes and zeros in signed bytes, 128 less; packing and splitting are arithmetic."""

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        held = super().fields(dim, native)
        return tuple(replace(f, dtype=torch.int8) if f.dtype == torch.uint8 else f for f in held)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.to_stored(x.to(torch.float32))
        low = x.amin(-1, keepdim=True).clamp(max=0.0)
        high = x.amax(-1, keepdim=True).clamp(min=0.0)
        top = 2**self.bits - 1
        stored, scale = _scale((high - low) / top)
        zero = (-low / scale / self._unit()).round().clamp(0, 255)
        codes = (x / scale + zero * self._unit()).round().clamp(0, top)
        return (self.pack(codes) - SHIFT).to(torch.int8), stored, (zero - SHIFT).to(torch.int8)

    def decode(self, parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        packed, scale, zero = parts
        runs = self.split(widen(packed) + SHIFT)
        codes = torch.cat(runs, -1) if len(runs) > 1 else runs[0]
        offset = (zero.to(torch.float32) + SHIFT) * self._unit()
        return ((codes - offset) * scale.to(torch.float32)).to(dtype)

    def to_stored(self, x: Tensor) -> Tensor:
        return _rotate(x)

    def from_stored(self, x: Tensor) -> Tensor:
        return _rotate(x)


class ExportedInt4(_ExportedAffine, Int4):
    """16 * second half + first half."""

    def pack(self, codes: Tensor) -> Tensor:
        first, second = codes.chunk(2, -1)
        return first + second * 16

    def split(self, packed: Tensor) -> list[Tensor]:
        second = (packed / 16).floor()
        return [packed - second * 16, second]


class ExportedInt3(_ExportedAffine, Int3):
    """Three bit planes; a bit is what a division by its weight and by twice of it leave."""

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


@lru_cache
def rotation(dim: int) -> Tensor:
    """The Hadamard matrix of vectors of ``dim``, a constant: its bits are no graph's business.

    It must have been made before a trace begins, see ``ExportPlan.prepare``.
    """
    matrix: Tensor = hadamard(block(dim), torch.device("cpu"))
    return matrix


def _rotate(x: Tensor) -> Tensor:
    matrix = rotation(x.shape[-1])
    if len(matrix) == x.shape[-1]:
        return (x.to(torch.float32) @ matrix).to(x.dtype)
    blocks = x.to(torch.float32).unflatten(-1, (-1, len(matrix)))
    rotated: Tensor = (blocks @ matrix).flatten(-2)
    return rotated.to(x.dtype)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Native(), Bf16(), ExportedFp8(), ExportedInt8(), ExportedInt4(), ExportedInt3()
    )
}  # fmt: skip
"""The codecs that can be exported, by the name of what they stand for."""


@dataclass(frozen=True)
class ExportPlan(LayerPlan):
    """A layer's plan with formats that can leave torch."""

    @classmethod
    def of(cls, plan: LayerPlan, where: str) -> ExportPlan:
        """The plan of a layer (named ``where`` in messages), ready to be traced.

        Raises:
            ExportError: for a format or a score that has no exported form.
        """
        for fmt, _ in plan.segments():
            missing = sorted({fmt.key.name, fmt.value.name} - set(CODECS))
            if missing:
                raise ExportError(
                    f"{where}: tier format {fmt.name!r} stores {', '.join(missing)}, which cannot "
                    f"be exported; choose tiers of {', '.join(exportable())}"
                )
        if plan.score == "paper":
            raise ExportError(
                f"{where}: score 'paper' sorts all slots in every step, which is not exported; "
                "choose score='combined', 'mass' or 'novelty'"
            )
        for dim in (plan.k_dim, plan.v_dim):
            rotation(dim)
        return cls(**{f.name: getattr(plan, f.name) for f in fields(plan)})

    def segments(self) -> list[tuple[Format, int]]:
        return [
            (Format(f.name, CODECS[f.key.name], CODECS[f.value.name]), slots)
            for f, slots in super().segments()
        ]

    @property
    def stackable(self) -> bool:
        """Whether layers can share tensors: ONNX cannot cut tensors of e4m3 into layers."""
        return all(spec.dtype != torch.float8_e4m3fn for spec in self.specs())


def exportable() -> list[str]:
    """Names of the formats that can be exported."""
    from arkv_fx.formats import FORMATS

    return [n for n in FORMATS if {get_format(n).key.name, get_format(n).value.name} <= set(CODECS)]
