"""Results are flat rows: JSON or lines of JSON on disk, a table on the terminal."""

from __future__ import annotations

import json
import os
import warnings
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
    if not isinstance(rows, list) or not all(map(_flat, rows)):
        raise EvaluationError(f"{path}: is not a JSON list of flat rows")
    return list(rows)


class RowLog:
    """A file of rows, a line of JSON each, which grows as they come and is read by the next run.

    Args:
        path: nothing is read or written for None.
        keys: what every row has, in their order.

    Attributes:
        rows: all that are in the file.

    Raises:
        EvaluationError: if the file cannot be read, or is of another kind; it stays as it is.
    """

    def __init__(self, path: str | Path | None, keys: Sequence[str]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[Row] = []
        if self.path is None or not self.path.exists():
            return
        try:
            whole, newline, rest = self.path.read_text(encoding="utf-8").rpartition("\n")
            self.rows = [json.loads(line) for line in whole.splitlines()]
            begin = json.dumps({keys[0]: 0}).removesuffix("0}")
            last = _row_of(rest)
            if last is not None:  # whole but for the end of its line
                self.rows.append(last)
            elif not (rest.startswith(begin) or begin.startswith(rest)):
                raise ValueError(f"its last line does not begin with {begin}")
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path}: cannot be read as lines of JSON: {error}") from error
        if not all(_flat(row) and set(keys) <= set(row) for row in self.rows):
            raise EvaluationError(f"{path}: is not a file of rows that have {', '.join(keys)}")
        if last is not None:
            write_text(self.path, whole + newline + rest + "\n")
        elif rest:
            warnings.warn(
                f"{path}: its last line was not written to the end (a run was killed) and is taken "
                "out; what it was about is measured again",
                RuntimeWarning,
                stacklevel=2,
            )
            write_text(self.path, whole + newline)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows; they are on disk when this returns.

        Raises:
            OSError: if they cannot be written.
        """
        self.rows += rows
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())


def _row_of(text: str) -> Row | None:
    """What a line holds; None if it was not written to its end."""
    try:
        row: Row = json.loads(text)
    except ValueError:
        return None
    return row


def _flat(row: Any) -> bool:
    return isinstance(row, dict) and not any(isinstance(v, dict | list) for v in row.values())


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
