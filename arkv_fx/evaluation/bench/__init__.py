"""``arkv bench``: how fast it is, measured against the strongest of the known ways.

To add a section: a function like ``Section`` in a file of its own and a line in ``SECTIONS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from arkv_fx.errors import UnknownOptionError
from arkv_fx.evaluation.bench.attention import attention
from arkv_fx.evaluation.bench.cases import CASES, Case, Options, get_case
from arkv_fx.evaluation.bench.compilation import compile_
from arkv_fx.evaluation.bench.dispatch import dispatch
from arkv_fx.evaluation.bench.exported_graphs import export_
from arkv_fx.evaluation.bench.linear_layers import linear_layers
from arkv_fx.evaluation.bench.measurements import Measurement
from arkv_fx.evaluation.bench.prefill import prefill
from arkv_fx.evaluation.bench.timing import pinned
from arkv_fx.evaluation.bench.update import update
from arkv_fx.evaluation.bench.whole_model import model

__all__ = ["CASES", "SECTIONS", "Case", "Measurement", "Options", "Section", "bench", "get_case"]


class Section(Protocol):
    """One kind of measurement."""

    def __call__(self, options: Options, progress: Callable[[str], None]) -> list[Measurement]:
        """Measure; ``progress`` is called with what is done next."""


SECTIONS: dict[str, Section] = {
    "attention": attention,
    "update": update,
    "prefill": prefill,
    "dispatch": dispatch,
    "linear": linear_layers,
    "model": model,
    "compile": compile_,
    "export": export_,
}


def bench(
    sections: Sequence[str],
    options: Options,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Measurement]:
    """Run the named sections (none: all) one after another, on ``options.threads`` threads.

    Raises:
        UnknownOptionError: for an unknown section, before anything runs.
    """
    for name in sections:
        if name not in SECTIONS:
            raise UnknownOptionError(f"unknown section {name!r}; known: {', '.join(SECTIONS)}")
    with pinned(options.threads):
        return [
            row
            for name in dict.fromkeys(sections or SECTIONS)
            for row in SECTIONS[name](options, _prefixed(progress, name))
        ]


def _prefixed(progress: Callable[[str], None], name: str) -> Callable[[str], None]:
    return lambda message: progress(f"{name}: {message}")
