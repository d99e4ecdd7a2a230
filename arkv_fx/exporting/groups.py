"""State tensors of layers with equal plans, stacked: their names, shapes and order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arkv_fx.exporting.export_plan import ExportPlan
from arkv_fx.plan import TensorSpec
from arkv_fx.runtime.operators import from_bytes, to_bytes, widen

NAMES = {"ring.k.codes": "key", "ring.v.codes": "value"}
"""What runners know by other names; the rest are called as in ``LayerPlan.specs``."""


@dataclass(frozen=True)
class Group:
    """Layers of one plan, for ``batch`` sequences.

    A state tensor is [L, B, ...] of all its layers, or [B, ...] where there is but one: e4m3
    tensors cannot be cut, and so their layers are not stacked.
    """

    index: int
    plan: ExportPlan
    layers: tuple[int, ...]
    batch: int

    @property
    def rows(self) -> int:
        """Sequences times layers: the batch of an update of all of them."""
        return self.batch * len(self.layers)

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The shape of a state tensor."""
        lead = (len(self.layers), self.batch) if len(self.layers) > 1 else (self.batch,)
        return (*lead, *spec.shape)

    def names(self, prefix: str) -> list[str]:
        """Names of the state tensors, in the order of the plan's specs."""
        return [f"{prefix}.{self.index}.{NAMES.get(s.name, s.name)}" for s in self.plan.specs()]

    def empty(self) -> list[Tensor]:
        """The state before the first token."""
        return [
            torch.zeros(self.shape(s), dtype=s.dtype)
            if s.fill == 0
            else torch.full(self.shape(s), s.fill, dtype=s.dtype)
            for s in self.plan.specs()
        ]

    def opened(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The state as a graph computes with it: numbers, where no codec reads the bytes."""
        strange, whole = self.plan.strange, self.plan.whole
        return [
            from_bytes(x, strange[s.name]) if s.name in strange
            else widen(x) if s.name in whole else x
            for x, s in zip(tensors, self.plan.specs(), strict=True)
        ]  # fmt: skip

    def begun(self) -> list[Tensor]:
        """``opened`` of the state before the first token: zeros, where that has whole numbers.

        A compiler that takes every constant of a byte for codes must not see one that is none.
        """
        opened = self.opened(self.empty())
        return [
            torch.zeros(x.shape) if s.name in self.plan.whole else x
            for x, s in zip(opened, self.plan.specs(), strict=True)
        ]

    def closed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of ``opened``."""
        strange, whole = self.plan.strange, self.plan.whole
        return [
            to_bytes(x.to(strange[s.name])) if s.name in strange
            else x.to(s.dtype) if s.name in whole else x
            for x, s in zip(tensors, self.plan.specs(), strict=True)
        ]  # fmt: skip

    def rows_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors with layers and sequences as one dimension [L * B, ...]."""
        if len(self.layers) == 1:
            return list(tensors)
        return [x.flatten(0, 1) for x in tensors]

    def layer_of(self, tensors: Sequence[Tensor], place: int) -> list[Tensor]:
        """The tensors [B, ...] of the layer at ``place`` in the group."""
        return list(tensors) if len(self.layers) == 1 else [x[place] for x in tensors]

    def stack(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of ``rows_of``."""
        if len(self.layers) == 1:
            return list(rows)
        return [x.unflatten(0, (len(self.layers), self.batch)) for x in rows]


def group_layers(plans: Sequence[ExportPlan], batch: int) -> list[Group]:
    """Groups of layers of equal plans, in the order of their first layers."""
    members: dict[tuple[ExportPlan, int], list[int]] = {}
    for layer, plan in enumerate(plans):
        key = (plan, 0 if plan.stackable else layer)
        members.setdefault(key, []).append(layer)
    return [
        Group(index, plan, tuple(layers), batch)
        for index, ((plan, _), layers) in enumerate(members.items())
    ]


def places(own: Sequence[Group], stacked: Sequence[Group], prefix: str) -> dict[str, list[Any]]:
    """Which tensors are the same: by name in groups ``own`` the [name, layer of the stack] in
    others of the same layers, in which none is by itself that is not so in ``own``.
    """
    found: dict[str, list[Any]] = {}
    for group in own:
        (of,) = (other for other in stacked if group.layers[0] in other.layers)
        place = of.layers.index(group.layers[0])
        names = zip(group.names(prefix), of.names(prefix), strict=True)
        found |= {name: [other, place] for name, other in names}
    return found
