"""What each architecture is expected to do, in a file: any difference is a failure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.rows import Row

COLUMNS = ("status", "sites", "fused", "reasons", "wrong", "raised", "refused", "unasked")
"""The columns that are compared: none that is measured, only what was decided."""

Expected = dict[str, dict[str, Any]]


def load(path: Path) -> Expected:
    """What is expected with the installed transformers: columns by architecture.

    Raises:
        EvaluationError: if the file cannot be read or says nothing about this transformers.
    """
    versions = read(path)
    if transformers.__version__ not in versions:
        raise EvaluationError(
            f"{path}: expects nothing of transformers {transformers.__version__}, only of "
            f"{', '.join(versions)}; look at a run's table, then write the file with "
            "--update-expectations"
        )
    return versions[transformers.__version__]


def mismatches(rows: Sequence[Row], expected: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each value that is not the expected one: architecture, column, both values."""
    out = []
    for row in rows:
        name = row["architecture"]
        if name not in expected:
            out.append(f"{name}: nothing is expected, found {row['status']}")
            continue
        out += [
            f"{name}: {column}: expected {expected[name].get(column)!r}, found {row[column]!r}"
            for column in COLUMNS
            if expected[name].get(column) != row[column]
        ]
    return out


def update(path: Path, rows: Sequence[Row]) -> None:
    """Write ``rows`` as what is expected of them; other architectures and versions stay.

    Raises:
        EvaluationError: if the file exists and cannot be read.
    """
    versions = read(path) if path.exists() else {}
    known = versions.setdefault(transformers.__version__, {})
    for row in rows:
        known[row["architecture"]] = {column: row[column] for column in COLUMNS}
    versions[transformers.__version__] = dict(sorted(known.items()))
    path.write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Expected]:
    """Everything in the file, by version of transformers.

    Raises:
        EvaluationError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read as expectations: {error}") from error
    levels = isinstance(found, dict) and all(
        isinstance(version, dict) and all(isinstance(row, dict) for row in version.values())
        for version in found.values()
    )
    if not levels:
        raise EvaluationError(f"{path}: is not a JSON object of version, architecture, column")
    return dict(found)
