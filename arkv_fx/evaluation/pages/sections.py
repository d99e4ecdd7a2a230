"""What a report shows of each kind of rows: pictures, their legend, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from arkv_fx.calibration import Calibration
from arkv_fx.evaluation.fidelity import means
from arkv_fx.evaluation.pages.looks import Look
from arkv_fx.evaluation.pages.pictures import (
    METRICS,
    Metric,
    Picture,
    by_layer,
    memory,
    on_front,
    quality,
)
from arkv_fx.evaluation.pages.sheets import Sheet, sheet
from arkv_fx.evaluation.results import Row

SAME = {
    "tasks": ("model", "dtype", "text", "seed", "prompts", "task", "tokens"),
    "fidelity": ("model", "text", "context", "steps"),
}
"""What rows have in common that are drawn into one picture: only then are their methods compared
on the same."""
TITLE = {"tasks": ("task", "tokens"), "fidelity": ("text", "context")}
"""What a picture's title always says."""
LENGTH = {"tasks": "tokens", "fidelity": "context"}


@dataclass
class Section:
    """A part of the page; ``metrics`` are chosen from where there are several."""

    name: str
    title: str
    intro: list[str]
    metrics: tuple[Metric, ...] = ()
    legend: list[Look] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)


def fidelity(rows: Sequence[Row], styles: Mapping[str, Look]) -> Section:
    """Divergence from the full cache: a picture a text, their mean first."""
    metrics = METRICS["fidelity"]
    section = Section(
        "fidelity", "Fidelity to the full cache, per text",
        ["Down and to the left is better for divergence and perplexity, up and to the left for the "
         "top token."],
        metrics, _legend(rows, styles),
    )  # fmt: skip
    groups = _groups(rows, "fidelity")
    section.pictures = [
        quality(title, group, metrics, styles) for title, group in [*_means(rows), *groups]
    ]
    section.sheets = [
        sheet("fidelity-rows", "Rows of arkv eval fidelity", _judged(groups, "fidelity"))
    ]
    return section


def tasks(rows: Sequence[Row], styles: Mapping[str, Look]) -> Section:
    """Answers beside the full cache's: a picture a task and length."""
    metrics = METRICS["tasks"]
    section = Section(
        "tasks", "Tasks",
        ["Up and to the left is better. A task whose full cache scores low says little by its "
         "accuracy; its agreement still does."],
        metrics, _legend(rows, styles),
    )  # fmt: skip
    groups = _groups(rows, "tasks")
    section.pictures = [quality(title, group, metrics, styles) for title, group in groups]
    section.sheets = [sheet("tasks-rows", "Rows of arkv eval tasks", _judged(groups, "tasks"))]
    return section


def passkey(rows: Sequence[Row]) -> Section:
    """Passkeys found: a table, since these rows do not say what the caches took."""
    said = (
        "These rows say at which compression was asked, not how many bytes the caches took, so "
        "there is no picture of them; the task `passkey` of arkv eval tasks measures both."
    )
    shown = [{**row, "accuracy": row["correct"] / row["total"]} for row in rows]
    table = sheet("passkey-rows", "Rows of arkv eval passkey", shown)
    return Section("passkey", "Passkeys", [said], sheets=[table])


def memory_of(rows: Mapping[str, list[Row]], styles: Mapping[str, Look]) -> Section:
    """Bytes against context, where rows are of several lengths; else why there is no picture."""
    every = [row for kind in LENGTH for row in rows[kind]]
    section = Section("memory", "Memory against context length", [])
    for kind, length in LENGTH.items():
        settings = dict.fromkeys((row["model"], row.get("dtype", "")) for row in rows[kind])
        for model, dtype in settings:
            group = [r for r in rows[kind] if (r["model"], r.get("dtype", "")) == (model, dtype)]
            title = ", ".join(filter(None, (model, dtype, f"measured by {kind}")))
            picture = memory(title, group, length, styles)
            if picture is not None:
                section.pictures.append(picture)
            else:
                section.intro.append(
                    f"{title}: all rows are of {group[0][length]} tokens, which cannot tell how "
                    "memory goes with the length. Rows of two lengths and more can."
                )
    if section.pictures:
        section.legend = _legend(every, styles)
        section.intro.insert(
            0, "Measured bytes of all that the cache holds, for the compression asked for at each "
            "length: the most of all texts or tasks. Dashed: a full bf16 cache.",
        )  # fmt: skip
    if not every:
        section.intro.append("No row says how many bytes a cache took.")
    return section


def calibrated(calibration: Calibration, file: str) -> Section:
    """What each layer is given, in pictures and a table."""
    intro = [
        f"{file}: of {calibration.fingerprint}, by {calibration.mode!r}, from prompts of "
        f"{', '.join(map(str, calibration.samples))} tokens, for the budget it was made with. Rows "
        "do not name the weights they were measured with, so nothing here says that these are the "
        "same.",
    ]
    rows = [
        {key: value for key, value in vars(row).items() if key != "costs"}
        for row in calibration.layers
    ]
    return Section(
        "calibration", "Layers", intro, pictures=by_layer(calibration),
        sheets=[sheet("calibration-rows", "What was found of each layer", rows, ("layer",))],
    )  # fmt: skip


def _legend(rows: Sequence[Row], styles: Mapping[str, Look]) -> list[Look]:
    return [styles[method] for method in dict.fromkeys(row["method"] for row in rows)]


def _groups(rows: Sequence[Row], kind: str) -> list[tuple[str, list[Row]]]:
    """(title, rows) of each picture; a title says what is not the same in all of them."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in SAME[kind]), []).append(row)
    told = [
        i for i, key in enumerate(SAME[kind])
        if key in TITLE[kind]
        or len({values[i] for values in groups}) > 1
    ]  # fmt: skip
    return [
        (", ".join(_setting(SAME[kind][i], values[i]) for i in told), group)
        for values, group in groups.items()
    ]


def _setting(key: str, value: object) -> str:
    if key in ("tokens", "context"):
        return f"{value} tokens"
    return str(value) if key in ("task", "text", "model", "dtype") else f"{key} {value}"


def _means(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of the means over texts, where every method was measured on the same ones.

    And took the same bytes for each of them.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["context"], row["steps"]), []).append(row)
    found = []
    for (model, context, steps), group in groups.items():
        texts = {row["text"] for row in group}
        each = [(row["text"], row["method"], row["compression"]) for row in group]
        whole = len(set(each)) == len(each) == len(texts) * len({(m, c) for _, m, c in each})
        sizes = {(row["method"], row["compression"], row["bytes"]) for row in group}
        whole = whole and len(sizes) == len({(m, c) for _, m, c in each})
        numbers = all(isfinite(r[m.key]) for r in group for m in METRICS["fidelity"])
        if len(texts) > 1 and whole and numbers and all(r["ppl_ratio"] > 0 for r in group):
            title = f"mean of {len(texts)} texts, {context} tokens"
            if len(groups) > 1:
                title += f", {model}, steps {steps}"
            found.append((title, means(group)))
    return found


def _judged(groups: Sequence[tuple[str, list[Row]]], kind: str) -> list[Row]:
    """The rows with their share of the full cache's bytes, and in what nobody beats them."""
    out: list[Row] = []
    for _, group in groups:
        best = {m.key: [id(row) for row in on_front(group, m)] for m in METRICS[kind]}
        for row in group:
            judged = [key for key, rows in best.items() if id(row) in rows]
            out.append(
                {
                    **row,
                    "bytes / full": row["bytes"] / row["full_bytes"],
                    "on the front of": ", ".join(judged) or None,
                }
            )
    return out
