"""A layer's plan in graphs outside of torch: the same bytes, other arithmetic.

ONNX and TensorRT know no bit operations on codes and no unsigned selection, so each codec has a
form for them, see ``Codec.exported``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

from arkv_fx.errors import ExportError, UnsupportedFormatError
from arkv_fx.formats import FORMATS, Format
from arkv_fx.formats.hadamard import constant
from arkv_fx.formats.portable import STRANGE, PortableCodec, held_as
from arkv_fx.plan import LayerPlan, TensorSpec
from arkv_fx.scores import SCORES


@dataclass(frozen=True)
class ExportPlan(LayerPlan):
    """A layer's plan with formats that can leave torch."""

    portable: ClassVar[bool] = False

    @classmethod
    def of(cls, plan: LayerPlan, where: str) -> ExportPlan:
        """The plan of a layer (named ``where`` in messages), ready to be traced.

        Tiers without slots are left out: TensorRT takes an empty tensor of codes for a mistake.

        Raises:
            ExportError: for a format or a score that has no exported form.
        """
        try:
            for fmt, _ in plan.segments():
                fmt.exported()
        except UnsupportedFormatError as error:
            raise ExportError(
                f"{where}: {error}; choose tiers of {', '.join(exportable())}"
            ) from None
        if reason := plan.policy().unexportable:
            names = " or ".join(repr(s.name) for s in SCORES.values() if not s.unexportable)
            raise ExportError(
                f"{where}: score {plan.score!r} {reason}, which is not exported; "
                f"choose score={names}"
            )
        for dim in (plan.k_dim, plan.v_dim):
            constant(dim)
        whole = {f.name: getattr(plan, f.name) for f in fields(plan)}
        return cls(**whole | {"tiers": tuple(tier for tier in plan.tiers if tier.slots)})

    def segments(self) -> list[tuple[Format, int]]:
        return [(f.exported(), slots) for f, slots in super().segments()]

    @property
    def stackable(self) -> bool:
        """Whether layers can share tensors: ONNX cannot cut tensors of e4m3 into layers."""
        return all(spec.dtype != torch.float8_e4m3fn for spec in self.specs())

    @property
    def bytes_of(self) -> dict[str, torch.dtype]:
        """What tensors hold the bytes of, by name; those that are not named hold numbers."""
        return {}

    @property
    def strange(self) -> dict[str, torch.dtype]:
        """Those of them that no codec reads: the graph makes numbers of them where it begins."""
        return {}

    @property
    def whole(self) -> set[str]:
        """Statistics in whole numbers of a byte: likewise, for TensorRT takes those for codes."""
        return {f.name for f in self.policy().slot_fields if f.dtype == torch.int8}


class PortablePlan(ExportPlan):
    """A plan for graphs whose inputs and outputs every runtime has, see ``formats.portable``."""

    portable: ClassVar[bool] = True

    def segments(self) -> list[tuple[Format, int]]:
        return [
            (Format(f.name, *(PortableCodec(c, self.dtype) for c in f.codecs)), slots)
            for f, slots in super().segments()
        ]

    def specs(self) -> list[TensorSpec]:
        out = []
        for spec in super().specs():
            dtype, width = held_as(spec.dtype, spec.shape[-1] if spec.shape else 1)
            shape = (*spec.shape[:-1], width) if spec.shape else ()
            out.append(replace(spec, dtype=dtype, shape=shape))
        return out

    @property
    def bytes_of(self) -> dict[str, torch.dtype]:
        plain = ExportPlan(**{f.name: getattr(self, f.name) for f in fields(self)})
        return {s.name: s.dtype for s in plain.specs() if s.dtype in STRANGE}

    @property
    def strange(self) -> dict[str, torch.dtype]:
        return {s.name: s.dtype for s in super().specs() if s.dtype in STRANGE}


def exportable() -> list[str]:
    """Names of the formats that can be exported."""
    return [f.name for f in FORMATS.values() if all(c.exported() is not None for c in f.codecs)]
