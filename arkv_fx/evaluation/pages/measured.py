"""Rows that `arkv eval` wrote, read for a page: of a kind we know, or refused by their line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.results import Row


@dataclass(frozen=True)
class Check:
    """What a value of a row may be, and how that is called."""

    allowed: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    try:
        return _number(value) and isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        return False


TEXT = Check("a text", lambda value: isinstance(value, str))
TRUTH = Check("true or false", lambda value: isinstance(value, bool))
SCORE = Check("a number", lambda value: _finite(value) or isinstance(value, float))
WHOLE = Check("a whole number", lambda value: type(value) is int and _finite(value))
COUNT = Check("a whole number of at least 0", lambda value: WHOLE.holds(value) and value >= 0)
SIZE = Check("a whole number above 0", lambda value: type(value) is int and 0 < value < 2**63)
RATIO = Check("a number above 0 or null", lambda v: v is None or (_finite(v) and v > 0))

KINDS: dict[str, dict[str, Check]] = {
    "fidelity": {
        "kl_mean": SCORE, "model": TEXT, "text": TEXT, "method": TEXT, "compression": RATIO,
        "context": SIZE, "steps": SIZE, "bytes": SIZE, "full_bytes": SIZE, "top1": SCORE,
        "ppl_ratio": SCORE,
    },
    "passkey": {
        "correct": COUNT, "model": TEXT, "filler": TEXT, "question": COUNT, "keys": COUNT,
        "after": TRUTH, "context": SIZE, "method": TEXT, "compression": RATIO, "total": SIZE,
    },
    "tasks": {
        "task": TEXT, "model": TEXT, "dtype": TEXT, "text": TEXT, "seed": WHOLE, "prompts": SIZE,
        "tokens": SIZE, "method": TEXT, "compression": RATIO, "answers": SIZE,
        "full_accuracy": SCORE, "accuracy": SCORE, "agreement": SCORE, "bytes": SIZE,
        "full_bytes": SIZE,
    },
}  # fmt: skip
"""What every row of ``arkv eval fidelity``, ``passkey`` and ``tasks`` has; the first key is one
that no other kind has. Rows may have more, which tables show."""


@dataclass(frozen=True)
class Measurements:
    """Rows by kind, in the order of the files, and how many stood there more than once."""

    rows: dict[str, list[Row]]
    repeated: int


def read_all(paths: Sequence[str | Path]) -> Measurements:
    """The rows of files that ``--json`` wrote: JSON lists, or lines of JSON.

    A row that stands there twice, in one file or in two, is taken once.

    Raises:
        EvaluationError: naming file and line, if a file cannot be read, has no row, or a row is of
            no kind that we know, or damaged.
    """
    rows: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    seen: set[str] = set()
    repeated = 0
    for path in paths:
        found = list(_rows(path))
        if not found:
            raise EvaluationError(f"{path}: has not one row")
        for line, row in found:
            kind = _kind(row, f"{path}, line {line}")
            written = json.dumps(row, sort_keys=True)
            if written in seen:
                repeated += 1
            else:
                seen.add(written)
                rows[kind].append(row)
    return Measurements(rows, repeated)


def _rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each row of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as rows: {error}") from error
    if text.lstrip().startswith("["):
        _parse(text, path, 1)
        yield from _of_list(text)
        return
    # Not splitlines: a text in a row may hold what else ends a line.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parse(line, path, number)


def _parse(text: str, path: str | Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        raise EvaluationError(f"{where}: is no JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}, line {line}: cannot be read as a row: {error}") from error


def _of_list(text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each in a JSON list that is known to be whole."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = text.index("[") + 1
    while True:
        while text[at] in " \t\r\n,":
            at += 1
        if text[at] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        value, at = decoder.raw_decode(text, at)
        yield line, value


def _kind(row: Any, where: str) -> str:
    """The kind of a row, whose values are what they should be."""
    known = ", ".join(f"`arkv eval {kind}`" for kind in KINDS)
    if not isinstance(row, dict):
        raise EvaluationError(f"{where}: is no row (an object of JSON) of {known}")
    kind = next((kind for kind, keys in KINDS.items() if next(iter(keys)) in row), None)
    if kind is None:
        has = ", ".join(map(repr, list(row)[:8])) or "nothing"
        raise EvaluationError(f"{where}: is a row of none of {known}: it has {has}")
    missing = [key for key in KINDS[kind] if key not in row]
    if missing:
        raise EvaluationError(f"{where}: a row of `arkv eval {kind}` lacks {', '.join(missing)}")
    for key, check in KINDS[kind].items():
        if not check.holds(row[key]):
            raise EvaluationError(f"{where}: {key}={row[key]!r}: must be {check.allowed}")
    if kind == "passkey" and row["correct"] > row["total"]:
        raise EvaluationError(f"{where}: correct={row['correct']} of total={row['total']}")
    for key, value in row.items():
        if isinstance(value, (dict, list)):
            raise EvaluationError(f"{where}: {key!r} holds more than one value; rows are flat")
        try:
            f"{key}{value}".encode()
        except UnicodeEncodeError as error:
            raise EvaluationError(f"{where}: {key!r} cannot be written as text") from error
    return kind
