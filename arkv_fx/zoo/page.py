"""The table as a CSV file and as a page of the documentation."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from arkv_fx.evaluation.results import Row
from arkv_fx.files import write_text
from arkv_fx.zoo.checks import SMALL
from arkv_fx.zoo.drive import PROMPT, STEPS
from arkv_fx.zoo.outcome import COLUMNS, CORRECT, NOT_RUN, TOLERANCE
from arkv_fx.zoo.run import summary

SHOWN = (
    "architecture", "status", "sites", "fused", "identity", "padded", "chunked", "generate",
    "finite", "bounded", "repeatable", "moved", "graphs", "breaks", "control",
)  # fmt: skip


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write all columns, numbers with three digits; None is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({c: _cell(row[c]) for c in COLUMNS} for row in rows)


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Write the page: what was asked, the table, and what is not fused by its reason."""
    write_text(path, page(rows))


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    cached = [row for row in rows if row["status"] not in NOT_RUN]
    return "\n".join(
        [
            "# The zoo",
            "",
            "Language models of transformers, tiny and with random weights, before and after "
            "`arkv_fx.transform`. Written by `arkv zoo --page docs/zoo.md` "
            f"(transformers {transformers.__version__}, torch {torch.__version__}, float32, CPU).",
            "",
            f"**{sentence(rows)}**",
            "",
            *_LEGEND,
            "",
            *_table(SHOWN, cached),
            "",
            "## Not fused, by reason",
            "",
            *_grouped(cached),
            "",
            "## Not run",
            "",
            *(
                f"- {row['architecture']}: {row['status']}: {row['reasons'] or row['error']}"
                for row in rows
                if row["status"] in NOT_RUN
            ),
            "",
        ]
    )


def sentence(rows: Sequence[Row]) -> str:
    """What a table comes to, by kind of architecture."""
    parts = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        total = summary([row for row in rows if row["kind"] == kind])
        parts.append(
            f"{kind}: {total['cacheable']} of {total['architectures']} have a KV cache that runs "
            f"here, {total['fused']} are fully fused, {total['correct']} correct"
        )
    return "; ".join(parts)


_LEGEND = [
    f"- identity: the largest error of the logits of a {PROMPT}-token prompt and {STEPS} "
    "single-token steps, relative to the largest logit, with room for every token. At most "
    f"{TOLERANCE:g} is correct.",
    "- padded, generate: the same error in `generate()` of a left-padded batch of 2, and whether "
    "it gives the same tokens.",
    "- chunked: the error with the prompt in three chunks, where the model itself can.",
    f"- finite, bounded, repeatable: with {SMALL.budget} tokens kept, logits are finite, bytes "
    "stay what the report says, a second run gives the same logits; moved: what eviction changes.",
    "- graphs, breaks: compiled graphs and graph breaks of the first two columns.",
    "- control: what forgetting the cache changes; a small number would make the rest worthless.",
]


def _grouped(rows: Sequence[Row]) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["status"] != "fused":
            said = row["reasons"] or row["error"] or "-"
            wrong = "" if row["status"] in CORRECT else f" ({row['status']})"
            groups[said].append(f"{row['architecture']}{wrong}")
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"- {', '.join(names)}: {reason}" for reason, names in ordered]


def _table(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    lines = [[str(c) for c in columns], ["---"] * len(columns)]
    lines += [[_cell(row[c]) for c in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
