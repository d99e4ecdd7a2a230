"""Methods against each other: what they are and how to run them in, rows out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arkv_fx.evaluation.bench.cases import Options
from arkv_fx.evaluation.bench.measurements import Measurement
from arkv_fx.evaluation.bench.timing import Call, interleaved, stopwatch


@dataclass(frozen=True)
class Entrant:
    """A row without its result, and the call that is timed for it."""

    row: Measurement
    call: Call


def compete(
    entrants: Sequence[Entrant],
    options: Options,
    progress: Callable[[str], None],
    rounds: int | None = None,
    warmup: int = 2,
    after: Callable[[Mapping[str, Any]], None] = lambda results: None,
) -> list[Measurement]:
    """Time all entrants, interleaved; a row each, in their order.

    Each runs once before, and then ``warmup`` rounds untimed; for ``after`` see ``interleaved``.

    A kernel or a backend may refuse a shape or a device: then its row says so in ``note``.
    """
    works: dict[str, Call] = {}
    fails: dict[str, str] = {}
    for entrant in entrants:
        name = entrant.row.label
        progress(f"{entrant.row.case}: {name}, first call")
        try:
            entrant.call()  # compiles, too
        except (RuntimeError, ImportError, ValueError) as error:
            fails[name] = unavailable(error)
        else:
            works[name] = entrant.call
    rounds = rounds or options.rounds
    progress(f"{len(works)} methods, {rounds} rounds")
    watch = stopwatch(options.device)
    times = interleaved(works, rounds=rounds, warmup=warmup, watch=watch, after=after)
    return [
        row.timed(times[row.label]) if row.label in times else replace(row, note=fails[row.label])
        for row in (entrant.row for entrant in entrants)
    ]


def unavailable(error: Exception) -> str:
    """The note of a method that cannot run here."""
    said = " ".join(str(error).split()).partition(". ")[0]
    return f"not available: {said[:200]}"
