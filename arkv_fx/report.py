"""What became of every attention site, in rows that a person and a program can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from arkv_fx.config import ArkvConfig
from arkv_fx.plan import LayerPlan, allowance

if TYPE_CHECKING:
    from arkv_fx.passes.sites import Planned, Site


@dataclass(frozen=True)
class Report:
    """One row per attention site: path, layer, fused, reason, formats and slots, bytes.

    ``nbytes`` are per sequence, and of a cache that several attentions share they stand in the row
    of the one that updates it; ``full_nbytes`` are those of the full cache in the model's ``dtype``
    at ``context`` tokens, ``half_nbytes`` those of one in 16 bits, ``asked_nbytes`` what the
    configuration gives each layer (None: tokens). ``notes`` say what was asked for and cannot be.
    """

    rows: tuple[dict[str, Any], ...]
    context: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, graphs: Sequence[Sequence[Site]], config: ArkvConfig, notes: Iterable[str] = ()
    ) -> Report:
        """Merge the sites of all graphs: one is fused if every graph with a cache fused it."""
        merged: dict[tuple[str, int], dict[int | None, dict[str, Any]]] = {}
        for sites in graphs:
            for site in sites:
                row = site.row() | (_bytes(site.planned, config) if site.planned else {})
                # Where tracing breaks off between layers, they share their path and ordinal.
                same = merged.setdefault((row["path"], site.ordinal), {})
                # Scoring calls run the same attention without a cache: that is no failure.
                if not site.source and same:
                    continue
                if site.source:
                    same.pop(None, None)
                if site.layer not in same or same[site.layer]["fused"]:
                    same[site.layer] = row
        rows = [row for same in merged.values() for row in same.values()]
        alone = tuple(r for r in rows if not any(_names(o, r) for o in rows))
        said = [*notes, *_below_the_ring(alone)]
        return cls(alone, config.context, tuple(dict.fromkeys(said)))

    @property
    def fused(self) -> int:
        """Number of fused sites."""
        return sum(bool(r["fused"]) for r in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes per sequence of all fused sites."""
        return sum(r.get("nbytes", 0) for r in self.rows)

    @property
    def full_nbytes(self) -> int:
        """Bytes per sequence that the full cache takes for the fused sites at ``context``."""
        return sum(r.get("full_nbytes", 0) for r in self.rows)

    @property
    def half_nbytes(self) -> int:
        """Bytes per sequence of a full cache in 16 bits, whatever the model's dtype."""
        return sum(r.get("half_nbytes", 0) for r in self.rows)

    def __str__(self) -> str:
        lines = [f"{self.fused} of {len(self.rows)} attention sites fused"]
        if self.nbytes:
            full = against_full(
                self.nbytes, self.full_nbytes, self.half_nbytes,
                {row["dtype"] for row in self.rows if row["fused"]},
            )  # fmt: skip
            lines[0] += (
                f"; {self.nbytes / 2**20:.2f} MiB per sequence; at {self.context} tokens {full}"
            )
        for row in self.rows:
            if row["fused"]:
                tiers = " + ".join(f"{n} {f}" for f, n in row["tiers"].items())
                shared = "" if row["nbytes"] else ", a cache that another attention updates"
                lines.append(f"  fused    {row['path']}: {row['ring']} native + {tiers}{shared}")
            else:
                lines.append(f"  not      {row['path']}: {row['reason']}")
        return "\n".join([*lines, *(f"  note     {note}" for note in self.notes)])


def against_full(nbytes: int, full: int, half: int, dtypes: Iterable[str]) -> str:
    """What full caches take, in the model's ``dtypes`` and in 16 bits, and how many times more."""
    said = [(full, "/".join(sorted(dtypes))), (half, "16-bit")][: 2 if half != full else 1]
    return ", ".join(
        f"a full {name} cache takes {size / 2**20:.2f} MiB ({size / nbytes:.2f}x)"
        for size, name in said
    )


def _below_the_ring(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Said of layers that were given less than window and sinks need."""
    small = [
        r for r in rows
        if r["fused"] and r["asked_nbytes"] is not None and not r["sliding"]
        and r["slots"] == r["ring"] and r["nbytes"] > r["asked_nbytes"]
    ]  # fmt: skip
    if not small:
        return []
    held = " or ".join(str(tokens) for tokens in sorted({row["slots"] for row in small}))
    asked, taken = (sum(row[name] for row in small) for name in ("asked_nbytes", "nbytes"))
    return [
        f"the budget is below what window and sinks need, and does not act where the window is all "
        f"there is ({len(small)} of the attentions): such a layer holds {held} tokens; asked for "
        f"{asked} bytes, it takes {taken}. For more lower compression, or raise context or bytes"
    ]


def _names(other: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether ``other`` is the same site by a longer path.

    A graph that begins within a layer, behind a break, knows only the end of its modules' paths.
    """
    same = row["layer"] is not None and (other["layer"], other["source"], other["fused"]) == (
        row["layer"], row["source"], row["fused"],
    )  # fmt: skip
    return same and other["path"].endswith(f".{row['path']}")


def _slots(plan: LayerPlan) -> dict[str, int]:
    """Slots by format: a format may be that of two tiers."""
    found: dict[str, int] = {}
    for tier in plan.tiers:
        found[tier.format] = found.get(tier.format, 0) + tier.slots
    return found


def _bytes(planned: Planned, config: ArkvConfig) -> dict[str, Any]:
    plan, counted = planned.plan, planned.cache.last
    return {
        "ring": plan.ring,
        "tiers": _slots(plan),
        "slots": plan.slots,
        "sliding": plan.sliding,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "nbytes": plan.nbytes() if counted else 0,
        "asked_nbytes": allowance(config, plan) if counted and config.budget is None else None,
        "full_nbytes": plan.full_nbytes(config.context) if counted else 0,
        "half_nbytes": plan.full_nbytes(config.context, dtype=torch.bfloat16) if counted else 0,
    }
