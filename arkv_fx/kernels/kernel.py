"""What a kernel of the decode step is: one object with all that it can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from arkv_fx.formats import Codec
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan
from arkv_fx.state.view import View


class Attend(Protocol):
    """Attention of new tokens to the ring, the tiers and themselves; changes nothing."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        held: View,
        knobs: Knobs,
        query_pos: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Attend to every column: ring, tiers, new tokens.

        Args:
            q: [B, Hkv, G, T, Dk]; k: [B, Hkv, T, Dk]; v: [B, Hkv, T, Dv]; T is 1 for all kernels
                but the reference, which takes any.
            mask: None, or [B or 1, Hq or 1, T, S] bool or additive, its columns by position and
                the newest token last.
            held: the state; slots with ``pos`` -1 or beyond the sliding window are not seen.
            query_pos: [B, T] int32.

        Returns:
            The output [B, Hkv, G, T, Dv] and the probabilities [B, Hkv, G, T, N], N = slots + T,
            both float32; zeros where a query sees nothing.
        """


class Encoder(Protocol):
    """Stores many vectors as codes."""

    def __call__(
        self, codec: Codec, x: Tensor, source: Tensor, centre: Tensor | None, fields: list[Tensor]
    ) -> None:
        """Write vectors of x [B, Hkv, T, D] into the codec's fields, in place.

        Args:
            source: [B, Hkv, C] int64, which of the T vectors each slot takes; -1: none, it stays.
            centre: [B, Hkv, 1, D] float32, taken off before; None for zeros.
            fields: [B, Hkv, C, ...] each, contiguous.
        """


class Step(Protocol):
    """A whole decode step of layers of one plan in one call."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Sequence[Tensor],
        knobs: Knobs,
    ) -> Tensor:  # fmt: skip
        """Return and do what ``arkv_fx.ops.attend.attend`` does with one new token."""


@dataclass(frozen=True)
class WholeStep:
    """What makes whole steps of a plan, None for one that it does not know.

    ``traced`` makes them of operators; ``direct`` for real tensors outside of any tracing, and for
    one layer each: they may remember what they have seen.
    """

    traced: Callable[[LayerPlan], Step | None]
    direct: Callable[[LayerPlan], Step | None]


@dataclass(frozen=True)
class Writer:
    """How a decode step reads and writes slots where that is no indexing.

    ``take(field, slot)`` gives the row [B, Hkv, 1, W] of a storage tensor at slot [B, Hkv] int64;
    ``store`` puts a vector, as that of row 0, into slots.
    """

    take: Callable[[Tensor, Tensor], Tensor]
    store: Encoder


def _nothing(what: object) -> str:
    return ""


def _all_codecs(plan: LayerPlan) -> list[str]:
    return []


@dataclass(frozen=True)
class Kernel:
    """One query per head over all slots, and whatever else the kernel does its own way.

    What is None is done as the reference does it. ``obstacle`` says why the kernel cannot run on a
    device, "" if it can; ``lacks`` names the codecs of a plan that it has no form of. Of those that
    can run, the one of the highest ``priority`` is taken; without one it must be asked for.
    ``for_inductor``: it is written to be compiled, and slower than the reference if it is not.
    ``encode`` makes the codes of a prompt, ``writer`` stores one token, ``step`` makes whole steps.
    """

    name: str
    attend: Attend
    priority: int | None = None
    obstacle: Callable[[torch.device], str] = _nothing
    lacks: Callable[[LayerPlan], list[str]] = _all_codecs
    encode: Encoder | None = None
    writer: Writer | None = None
    step: WholeStep | None = None
    for_inductor: bool = False
