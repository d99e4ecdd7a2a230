"""The flat list of state tensors that a graph carries, seen by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arkv_fx.formats import Codec, Format
from arkv_fx.plan import LayerPlan
from arkv_fx.scores import Stats


@dataclass
class Segment:
    """The ring or one tier: slots of one format.

    ``k`` and ``v`` are the codec's fields [B, Hkv, C, width]; ``pos`` int32 or int16 [B, Hkv, C]
    with -1 for an empty slot and ``stats``, the score's statistics [B, Hkv, C], are slices of the
    view's from slot ``start``; ``centre`` [B, Hkv, 1, Dk] is what its keys are stored without, if
    anything.
    """

    format: Format
    start: int
    slots: int
    k: list[Tensor]
    v: list[Tensor]
    pos: Tensor
    stats: Stats
    centre: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """``pos`` as it is now, to compute with: int32."""
        return as_int32(self.pos)

    def keys_and_values(self, index: Any, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens as float32 numbers: of all slots (``index`` ``...``) or of one per head."""
        k, v = (
            codec.from_stored(codec.decode([f[index] for f in fields], dim, torch.float32))
            for (codec, fields), dim in zip(self.parts(), dims, strict=True)
        )
        if self.centre is not None:
            k = k + (self.centre if k.dim() == 4 else self.centre.squeeze(2))
        return k, v

    def parts(self) -> list[tuple[Codec, list[Tensor]]]:
        """(codec, fields) of the keys and of the values."""
        return [(self.format.key, self.k), (self.format.value, self.v)]


@dataclass
class View:
    """All of a layer's state.

    ``count`` [B] int32 real (not padding) tokens so far, ``seen`` [B] int32 positions so far,
    ``bad`` [B] int32, set once keys or values were not finite; ``layer`` the score's sums and,
    if the plan is balanced, the channels' numbers ``scale``;
    ``centre`` [B, Hkv, Dk] float32, see ``LayerPlan``; ``pos`` and ``stats`` [B, Hkv, N] of all
    slots, ring first.
    """

    plan: LayerPlan
    count: Tensor
    seen: Tensor
    bad: Tensor
    layer: Stats
    centre: Tensor | None
    pos: Tensor
    stats: Stats
    segments: list[Segment]

    @property
    def positions(self) -> Tensor:
        """``pos`` as it is now, to compute with: int32."""
        return as_int32(self.pos)

    @property
    def ring(self) -> Segment:
        """Sinks and window, in the model's dtype."""
        return self.segments[0]

    @property
    def tiers(self) -> list[Segment]:
        """The tiers, most precise first."""
        return self.segments[1:]


def as_int32(pos: Tensor) -> Tensor:
    """Positions as int32; themselves if they are."""
    return pos if pos.dtype == torch.int32 else apart(pos.to(torch.int32))


def write_positions(field: Tensor, pos: Tensor) -> None:
    """Let ``field`` hold the int32 positions ``pos``."""
    field.copy_(pos if field.dtype == torch.int32 else apart(pos))


def apart(x: Tensor) -> Tensor:
    """``x``, on a CPU made in a loop of its own.

    A restride makes Inductor write it out. It vectorises no loop in which there is an int16.
    """
    return x.as_strided(x.size(), x.stride()) if x.device.type == "cpu" else x


def view(plan: LayerPlan, tensors: Sequence[Tensor]) -> View:
    """The tensors of ``plan.specs()``, given in that order, by name."""
    named = dict(zip(plan.places, tensors, strict=True))
    policy = plan.policy()
    # A running sum is one vector per head; specs give it the layout [B, Hkv, width].
    layer = {f.name: named[f.name] for f in policy.layer_fields(plan.k_dim, plan.v_dim)}
    if plan.balanced:
        layer["scale"] = named["scale"]
    centre = named["centre"] if plan.centred else None
    pos = named["pos"]
    stats = {f.name: named[f.name] for f in policy.slot_fields}
    segments: list[Segment] = []
    start = 0
    for (fmt, slots), sides in zip(plan.segments(), plan.stored, strict=True):
        k, v = ([named[name] for name in side] for side in sides)
        part = slice(start, start + slots)
        own = {name: t[..., part] for name, t in stats.items()}
        segment = Segment(fmt, start, slots, k, v, pos[..., part], own)
        if centre is not None and segments and fmt.key.centred:
            segment.centre = centre[:, :, None]
        segments.append(segment)
        start += slots
    count, seen, bad = named["count"], named["seen"], named["bad"]
    return View(plan, count, seen, bad, layer, centre, pos, stats, segments)
