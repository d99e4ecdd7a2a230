"""How a method looks on a page: a colour and a symbol, the same in every picture and legend.

The colours are Okabe and Ito's, which people with any colour vision tell apart; the symbol says it
without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
SYMBOLS = {
    "circle": "M2 8a6 6 0 1 0 12 0a6 6 0 1 0-12 0",
    "square": "M3 3h10v10H3z",
    "diamond": "M8 1l7 7-7 7-7-7z",
    "triangle-up": "M8 2l7 12H1z",
    "cross": "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z",
    "triangle-down": "M8 14L1 2h14z",
    "x": "M3 5l2-2 3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3z",
}
"""Plotly's names, and what they look like in a square of 16."""

DIFFERENT = len(COLOURS) * len(SYMBOLS)
"""So many looks there are: six and seven have no common part."""


@dataclass(frozen=True)
class Look:
    """One method's: ``path`` draws ``symbol`` in a legend."""

    method: str
    colour: str
    symbol: str

    @property
    def path(self) -> str:
        """Of an SVG in a square of 16."""
        return SYMBOLS[self.symbol]


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method; ``DIFFERENT`` of them differ."""
    symbols = list(SYMBOLS)
    return {
        method: Look(method, COLOURS[i % len(COLOURS)], symbols[i % len(symbols)])
        for i, method in enumerate(dict.fromkeys(methods))
    }
