"""Kernels of the decode step's attention, by name: one query per head over all slots.

To add one: a function like ``Kernel`` in a file of its own and a line in ``KERNELS``. The
reference defines what all of them compute.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from arkv_fx.errors import UnknownOptionError
from arkv_fx.formats import Codec
from arkv_fx.kernels.cpp import attend_cpp, available, encode_cpp, make_direct_step, make_step
from arkv_fx.kernels.cpp.arguments import codecs
from arkv_fx.kernels.inductor import attend_one
from arkv_fx.kernels.reference import attend_columns, encode_rows
from arkv_fx.kernels.selection import encode_empty, store_vector, take_slot
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.kernels.triton import CODECS as TRITON_CODECS
from arkv_fx.kernels.triton import attend_triton
from arkv_fx.plan import LayerPlan
from arkv_fx.state.view import View

__all__ = [
    "ENCODERS", "KERNELS", "STEPS", "WRITERS", "Encoder", "Kernel", "Step", "WholeStep", "Writer",
    "get_direct_step", "get_kernel", "get_step", "usable",
]  # fmt: skip


class Kernel(Protocol):
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


KERNELS: dict[str, Kernel] = {
    "reference": attend_columns,
    "inductor": attend_one,
    "cpp": attend_cpp,
    "triton": attend_triton,
    "export": attend_columns,
    "export_sums": partial(attend_columns, sums=True),
}


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


# By the name of the kernel whose attention they hold. Optional: without, plain torch updates the
# state after the kernel's attention.
STEPS: dict[str, WholeStep] = {"cpp": WholeStep(make_step, make_direct_step)}


# What makes the codes of a prompt, by the name of the kernel that decodes after it; for all others
# it is the reference.
ENCODERS: dict[str, Encoder] = {
    "reference": encode_rows, "cpp": encode_cpp, "export": encode_empty,
    "export_sums": encode_empty,
}  # fmt: skip


@dataclass(frozen=True)
class Writer:
    """How a decode step reads and writes slots where that is no indexing.

    ``take(field, slot)`` gives the row [B, Hkv, 1, W] of a storage tensor at slot [B, Hkv] int64;
    ``store`` puts a vector, as that of row 0, into slots.
    """

    take: Callable[[Tensor, Tensor], Tensor]
    store: Encoder


# By the name of the kernel that attends in the same graph; for all others it is indexing.
WRITERS: dict[str, Writer] = dict.fromkeys(
    ("export", "export_sums"), Writer(take_slot, store_vector)
)


def get_step(kernel: str, plan: LayerPlan) -> Step | None:
    """The whole decode step of a kernel, None if it has none that knows the plan."""
    return STEPS[kernel].traced(plan) if kernel in STEPS else None


def get_direct_step(kernel: str, plan: LayerPlan) -> Step | None:
    """The same for one layer of a compiled graph, called with real tensors."""
    return STEPS[kernel].direct(plan) if kernel in STEPS else None


def get_kernel(name: str) -> Kernel:
    """The kernel called ``name``; raises ``UnknownOptionError``, which lists the names."""
    if name not in KERNELS:
        raise UnknownOptionError(f"unknown kernel {name!r}; the kernels are {', '.join(KERNELS)}")
    return KERNELS[name]


def usable(device: torch.device, plan: LayerPlan | None = None) -> list[str]:
    """Names of the kernels that can run on ``device``, the fastest first.

    With a ``plan``, those that know its formats: a new format is known to the plain-torch ones.
    """
    names = {c.name for f, _ in plan.segments() for c in (f.key, f.value)} if plan else set()
    fast = []
    triton = importlib.util.find_spec("triton") is not None
    if device.type == "cuda" and triton and names <= TRITON_CODECS:
        fast.append("triton")
    if device.type == "cpu" and not available() and (plan is None or codecs(plan) is not None):
        fast.append("cpp")
    return [*fast, "inductor", "reference"]
