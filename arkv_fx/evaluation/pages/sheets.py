"""Rows as a table of a page: cells that a person reads, and what they are sorted by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from arkv_fx.evaluation.results import Row


@dataclass(frozen=True)
class Cell:
    """What is read, and what it is sorted by: a number as JSON has it, else "" (by the text)."""

    text: str
    number: str


@dataclass(frozen=True)
class Sheet:
    """A table: ``same`` says what all rows share, which has no column."""

    name: str
    title: str
    same: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]


def sheet(name: str, title: str, rows: Sequence[Row], leading: Sequence[str] = ()) -> Sheet:
    """A table with a column for each key of the rows, ``leading`` ones first.

    A column whose numbers are all whole has no decimals.
    """
    whole = {key for row in rows for key in row} - {
        key for row in rows for key, x in row.items() if isinstance(x, float) and x % 1 != 0
    }
    rows = [
        {key: int(x) if isinstance(x, float) and key in whole else x for key, x in row.items()}
        for row in rows
    ]
    every = list(dict.fromkeys([*leading, *(key for row in rows for key in row)]))
    same = [
        key for key in every
        if len(rows) > 1 and len({repr(row.get(key)) for row in rows}) == 1 and key not in leading
    ]  # fmt: skip
    columns = tuple(key for key in every if key not in same)
    return Sheet(
        name,
        title,
        ", ".join(f"{key} {cell(rows[0].get(key)).text}" for key in same),
        columns,
        tuple(all(_is_number(row.get(key)) for row in rows) for key in columns),
        tuple(tuple(cell(row.get(key)) for key in columns) for row in rows),
    )


def cell(value: Any) -> Cell:
    """A value as a cell; what is no number, or none that is finite, has none to sort by."""
    if value is None:
        return Cell("-", "")
    if isinstance(value, bool):
        return Cell("yes" if value else "no", "")
    if isinstance(value, float):
        text = f"{value:.3g}" if abs(value) < 0.1 or abs(value) >= 1e6 else f"{value:.3f}"
        return Cell(text, repr(value) if isfinite(value) else "")
    return Cell(str(value), str(value) if isinstance(value, int) else "")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
