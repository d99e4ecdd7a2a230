"""Results are flat rows: JSON on disk, a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from arkv_fx.errors import EvaluationError
from arkv_fx.files import write_text

Row = dict[str, Any]


def write(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as a JSON list."""
    write_text(path, json.dumps(list(rows), indent=1) + "\n")


def read(path: str | Path) -> list[Row]:
    """Read what ``write`` wrote.

    Raises:
        EvaluationError: if the file cannot be read or is no list of flat rows.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read as rows: {error}") from error
    flat = isinstance(rows, list) and all(
        isinstance(row, dict) and not any(isinstance(v, dict | list) for v in row.values())
        for row in rows
    )
    if not flat:
        raise EvaluationError(f"{path}: is not a JSON list of flat rows")
    return list(rows)


def table(title: str, rows: Sequence[Row]) -> Table:
    """A rich table with a column for each key; what is the same in all rows goes below it."""
    columns = list(rows[0]) if rows else []
    same = [c for c in columns if len(rows) > 1 and len({repr(row.get(c)) for row in rows}) == 1]
    caption = ", ".join(f"{name} {_text(rows[0][name])}" for name in same)
    out = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    columns = [name for name in columns if name not in same]
    for name in columns:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        out.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        out.add_row(*(_text(row.get(name)) for name in columns))
    return out


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"
    return str(value)
