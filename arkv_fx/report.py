"""What became of every attention site, in rows that a person and a program can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arkv_fx.config import ArkvConfig

if TYPE_CHECKING:
    from arkv_fx.passes.sites import Planned, Site


@dataclass(frozen=True)
class Report:
    """One row per attention site: path, layer, fused, reason, formats and slots, bytes.

    ``nbytes`` are per sequence, and of a cache that several attentions share they stand in the row
    of the one that updates it; ``full_nbytes`` are those of the full cache in the model's dtype
    at ``context`` tokens. ``notes`` say what else was asked for and cannot be.
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
        return cls(alone, config.context, tuple(dict.fromkeys(notes)))

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

    def __str__(self) -> str:
        lines = [f"{self.fused} of {len(self.rows)} attention sites fused"]
        if self.nbytes:
            lines[0] += (
                f"; {self.nbytes / 2**20:.2f} MiB per sequence against "
                f"{self.full_nbytes / 2**20:.2f} MiB at {self.context} tokens "
                f"({self.full_nbytes / self.nbytes:.2f}x)"
            )
        for row in self.rows:
            if row["fused"]:
                tiers = " + ".join(f"{n} {f}" for f, n in row["tiers"].items())
                shared = "" if row["nbytes"] else ", a cache that another attention updates"
                lines.append(f"  fused    {row['path']}: {row['ring']} native + {tiers}{shared}")
            else:
                lines.append(f"  not      {row['path']}: {row['reason']}")
        return "\n".join([*lines, *(f"  note     {note}" for note in self.notes)])


def _names(other: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether ``other`` is the same site by a longer path.

    A graph that begins within a layer, behind a break, knows only the end of its modules' paths.
    """
    same = row["layer"] is not None and (other["layer"], other["source"], other["fused"]) == (
        row["layer"], row["source"], row["fused"],
    )  # fmt: skip
    return same and other["path"].endswith(f".{row['path']}")


def _bytes(planned: Planned, config: ArkvConfig) -> dict[str, Any]:
    plan, counted = planned.plan, planned.cache.last
    return {
        "ring": plan.ring,
        "tiers": {t.format: t.slots for t in plan.tiers},
        "slots": plan.slots,
        "nbytes": plan.nbytes() if counted else 0,
        "full_nbytes": plan.full_nbytes(config.context) if counted else 0,
    }
