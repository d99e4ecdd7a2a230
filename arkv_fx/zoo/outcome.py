"""The row of an architecture: its columns, and what status they make."""

from __future__ import annotations

from typing import Any

from arkv_fx.evaluation.results import Row
from arkv_fx.zoo.configs import kind_of

TOLERANCE = 1e-4
VISIBLE = 1e-2  # dropping the cache moves the logits by more, or the comparison is blind

COLUMNS = (
    "architecture", "kind", "status", "sites", "fused", "reasons", "identity", "padded", "chunked",
    "generate", "finite", "bounded", "repeatable", "moved", "graphs", "breaks", "own", "control",
    "wrong", "raised", "refused", "unasked", "error", "seconds",
)  # fmt: skip
"""The columns of a row, in order.

identity, padded, chunked: relative error of the logits with room for everything, against the same
calls of the model as it was; padded and generate are of ``generate()`` on a left-padded batch: its
logits and whether it gives the same greedy tokens; finite, bounded (bytes stay what the
report says), repeatable: under an evicting budget, which moves the logits by ``moved``; own: what
the model's own cache changes against one forward; control: what dropping the cache changes;
wrong, raised, refused: the checks whose answer is wrong, those that ended in an error, and those
that ended in an error of ours, which says what to do; error: the first of these errors; unasked:
the checks that the model itself fails before it is transformed.
"""

TEXTS = ("reasons", "wrong", "raised", "refused", "unasked", "error")
"""The columns that are texts: "" where there is nothing to say, lists as in "padded, generate"."""

WRONG = ("wrong", "crashed", "raised", "blind")
CORRECT = ("refused", "unfused", "partly", "fused")
NOT_RUN = ("no reference", "not built", "no cache")
"""The statuses, worst first. The first four are failures; the next compute nothing wrong, "refused"
if a check ended in an error that says what to do; the last have no cache that runs here."""


def worst_first(row: Row) -> tuple[int, str]:
    """A key to sort rows by."""
    return (*WRONG, *CORRECT, *NOT_RUN).index(row["status"]), row["architecture"]


def blank(name: str) -> Row:
    """A row without answers."""
    row: Row = dict.fromkeys(COLUMNS)
    return row | dict.fromkeys(TEXTS, "") | {"architecture": name, "kind": kind_of(name)}


def note(row: Row, column: str, *names: str) -> None:
    """Add names to a column that is a list."""
    row[column] = ", ".join(filter(None, [row[column], *names]))


def is_wrong(column: str, value: Any) -> bool:
    """Whether a check's answer is not the right one; None is no answer."""
    if column in ("identity", "padded", "chunked"):
        return value is not None and not value <= TOLERANCE
    return value is False


def status_of(row: Row) -> str:
    """The status of a row whose checks have all been made."""
    for status in ("wrong", "raised", "refused"):
        if row[status]:
            return status
    if row["sites"] and row["sites"] == row["fused"]:
        return "fused"
    return "partly" if row["fused"] else "unfused"
