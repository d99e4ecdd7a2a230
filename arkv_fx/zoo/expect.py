"""What each architecture is expected to do, in a file: any difference is a failure.

The file has a part for each version of transformers, and a version only says what it does otherwise
than its nearest neighbour: of an architecture that the installed version's part does not have, the
same is expected as of the nearest version whose part has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from packaging.version import VERSION_PATTERN, Version

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.results import Row
from arkv_fx.files import write_text

COLUMNS = ("status", "sites", "fused", "reasons", "wrong", "raised", "refused", "unasked")
"""The columns that are compared: none that is measured, only what was decided."""

VERSION = re.compile(VERSION_PATTERN, re.VERBOSE | re.IGNORECASE)

Expected = dict[str, dict[str, Any]]


def load(path: Path) -> Expected:
    """What is expected with the installed transformers: columns by architecture.

    Raises:
        EvaluationError: if the file cannot be read or expects nothing.
    """
    expected = _nearest(read(path))
    if not expected:
        raise EvaluationError(
            f"{path}: expects nothing of transformers {transformers.__version__}, nor of any other "
            "version; look at a run's table, then write the file with --update-expectations"
        )
    return expected


def _nearest(versions: Mapping[str, Expected]) -> Expected:
    """Each architecture's columns of the version that is nearest to the installed one."""

    def number(version: str) -> int:
        parts = Version(version)
        return (parts.major * 1000 + parts.minor) * 1000 + parts.micro

    def distance(version: str) -> tuple[int, bool]:
        apart = number(version) - number(transformers.__version__)
        return abs(apart), apart > 0  # of two as near, the older

    found: Expected = {}
    for version in sorted(versions, key=distance, reverse=True):
        found.update(versions[version])
    return found


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

    What the nearest other version has the same is left out.

    Raises:
        EvaluationError: if the file exists and cannot be read.
    """
    versions = read(path) if path.exists() else {}
    known = versions.pop(transformers.__version__, {})
    elsewhere = _nearest(versions)
    for row in rows:
        name, found = row["architecture"], {column: row[column] for column in COLUMNS}
        known.pop(name, None)
        if elsewhere.get(name) != found:
            known[name] = found
    versions[transformers.__version__] = dict(sorted(known.items()))
    write_text(path, json.dumps(versions, indent=1) + "\n")


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
        VERSION.fullmatch(version)
        and isinstance(part, dict)
        and all(isinstance(row, dict) for row in part.values())
        for version, part in found.items()
    )
    if not levels:
        raise EvaluationError(f"{path}: is not a JSON object of version, architecture, column")
    return dict(found)
