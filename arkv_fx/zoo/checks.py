"""What is asked of one architecture, and the row of answers."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arkv_fx.cache import ArkvCache
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ArkvError, ModelNotFoundError
from arkv_fx.evaluation.rows import Row
from arkv_fx.transform import Transformed, restore, transform
from arkv_fx.zoo import drive
from arkv_fx.zoo.configs import NOT_CACHEABLE, tiny_model
from arkv_fx.zoo.drive import CHUNKED, STEPWISE

ROOMY = ArkvConfig(budget=128, tiers=("native",))
SMALL = ArkvConfig(budget=24, window=6, sinks=2, tiers=("int8", "int4"))
TOLERANCE = 1e-4
VISIBLE = 1e-2  # dropping the cache moves the logits by more, or the comparison is blind

COLUMNS = (
    "architecture", "status", "sites", "fused", "reasons", "identity", "padded", "chunked",
    "generate", "finite", "bounded", "repeatable", "moved", "graphs", "breaks", "own", "control",
    "wrong", "raised", "refused", "error", "seconds",
)  # fmt: skip
"""The columns of a row, in order.

identity, padded, chunked: relative error of the logits with room for everything, against the same
calls of the model as it was; generate: the same greedy tokens; finite, bounded (bytes stay what the
report says), repeatable: under an evicting budget, which moves the logits by ``moved``; own: what
the model's own cache changes against one forward; control: what dropping the cache changes;
wrong, raised, refused: the checks whose answer is wrong, those that ended in an error, and those
that ended in an error of ours, which says what to do; error: the first of these errors.
"""

TEXTS = ("reasons", "wrong", "raised", "refused", "error")
"""The columns that are texts: "" where there is nothing to say, lists as in "padded, generate"."""

NOT_RUN = ("no cache", "not built", "no reference")
"""The statuses of what has no cache, or that transformers itself cannot run with one here."""

CORRECT = ("fused", "partly", "unfused", "refused")
"""The statuses in which nothing wrong was computed; "refused" if any check was."""


@dataclass
class Subject:
    """A tiny model with what it answered before it was transformed."""

    model: PreTrainedModel
    batches: dict[str, drive.Batch] = field(default_factory=drive.batches)
    answers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def arkv(self) -> Transformed:
        """What ``transform`` put on the model."""
        found: Transformed = self.model.arkv  # type: ignore[assignment]
        return found

    def error(self, pieces: tuple[int, ...], batch: str, answer: str) -> float:
        """Relative error of the transformed model."""
        found = drive.logits(self.model, self.batches[batch], pieces, ArkvCache(self.model))
        return drive.difference(found, self.answers[answer], self.batches[batch])


def blank(name: str) -> Row:
    """A row without answers."""
    return dict.fromkeys(COLUMNS) | {"architecture": name} | dict.fromkeys(TEXTS, "")


def examine(name: str, *, quick: bool = False) -> Row:
    """One row about the architecture ``name``; whatever goes wrong is in the row.

    ``quick`` leaves out chunks, ``generate()`` and eviction: their columns are None.
    """
    row = blank(name)
    began = time.perf_counter()
    if name in NOT_CACHEABLE:
        row |= {"status": "no cache", "reasons": NOT_CACHEABLE[name]}
    else:
        row["status"] = _examine(name, row, quick)
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


def _examine(name: str, row: Row, quick: bool) -> str:
    """Fill the row in and return the status."""
    try:
        subject = Subject(tiny_model(name))
    except (ModelNotFoundError, RuntimeError) as error:
        row["error"] = _text(error)
        return "not built"
    try:
        row |= _as_it_was(subject, quick)
    except Exception as error:
        row["error"] = _text(error)
        return "no reference"
    if not row["control"] > VISIBLE:
        return "blind"
    for config, checks in [(ROOMY, _ROOMY_QUICK if quick else _ROOMY), (SMALL, _SMALL)]:
        if not (quick and config is SMALL):
            _under(subject, config, checks, row)
    return _status(row)


def _as_it_was(subject: Subject, quick: bool) -> Row:
    """Answers of the model with its own cache, and what that and its loss change."""
    model, answers = subject.model, subject.answers
    for name, batch in subject.batches.items():
        answers[name] = drive.logits(model, batch, STEPWISE, drive.own_cache(model))
    single = subject.batches["single"]
    at_once = drive.logits(model, single, drive.AT_ONCE, None)
    forgetful = drive.logits(model, single, STEPWISE, None)
    if not quick:
        try:
            chunked = drive.logits(model, single, CHUNKED, drive.own_cache(model))
            if drive.difference(chunked, answers["single"], single) < VISIBLE:
                answers["chunked"] = chunked
            answers["generate"] = drive.generate(model, subject.batches["padded"])
        except Exception:  # the model itself cannot: then nothing is asked of us
            pass
    return {
        "own": drive.difference(answers["single"], at_once, single),
        "control": drive.difference(forgetful, answers["single"], single),
    }


Check = Callable[[Subject], Row]


def _under(subject: Subject, config: ArkvConfig, checks: dict[str, Check], row: Row) -> None:
    """Transform the model, run the checks, and put answers and errors into the row."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    checks = {"transform": lambda _: _transform(subject, config), **checks}
    for name, check in checks.items():
        try:
            found = check(subject)
        except Exception as error:
            _add(row, "refused" if isinstance(error, ArkvError) else "raised", name)
            row["error"] = row["error"] or f"{name}: {_text(error)}"
            if name == "transform":
                return
        else:
            row |= found
            _add(row, "wrong", *(c for c, value in found.items() if _is_wrong(c, value)))
    if config is ROOMY:
        row |= _report(subject)
    restore(subject.model)


def _transform(subject: Subject, config: ArkvConfig) -> Row:
    transform(subject.model, config, compile="eager")
    return {}


def _identity(subject: Subject) -> Row:
    return {"identity": subject.error(STEPWISE, "single", "single")}


def _padded(subject: Subject) -> Row:
    error = subject.error(STEPWISE, "padded", "padded")
    breaks = torch._dynamo.utils.counters["graph_break"]
    graphs = subject.arkv.backend.graphs
    return {"padded": error, "graphs": graphs, "breaks": sum(breaks.values())}


def _chunked(subject: Subject) -> Row:
    known = "chunked" in subject.answers
    return {"chunked": subject.error(CHUNKED, "single", "chunked") if known else None}


def _generate(subject: Subject) -> Row:
    if "generate" not in subject.answers:
        return {"generate": None}
    tokens = drive.generate(subject.model, subject.batches["padded"])
    return {"generate": torch.equal(tokens, subject.answers["generate"])}


def _evict(subject: Subject) -> Row:
    """Two runs under a budget that does not hold the prompt."""
    single, model = subject.batches["single"], subject.model
    caches = [ArkvCache(model), ArkvCache(model)]
    first, second = [drive.logits(model, single, STEPWISE, cache) for cache in caches]
    report = subject.arkv.report()
    bounded = None
    if report.fused == len(report.rows):  # what is not fused keeps everything
        cache = ArkvCache(model)
        drive.logits(model, single, STEPWISE[:2], cache)
        sizes = {cache.nbytes(), caches[0].nbytes(), report.nbytes + caches[0].handle.nbytes}
        bounded = len(sizes) == 1
    return {
        "finite": bool(first.isfinite().all()),
        "bounded": bounded,
        "repeatable": torch.equal(first, second),
        "moved": drive.difference(first, subject.answers["single"], single),
    }


_ROOMY_QUICK: dict[str, Check] = {"identity": _identity, "padded": _padded}
_ROOMY: dict[str, Check] = {**_ROOMY_QUICK, "chunked": _chunked, "generate": _generate}
_SMALL: dict[str, Check] = {"evict": _evict}


def _is_wrong(column: str, value: Any) -> bool:
    if column in ("identity", "padded", "chunked"):
        return value is not None and not value <= TOLERANCE
    return value is False


def _report(subject: Subject) -> Row:
    backend = subject.arkv.backend
    if not backend.sites:
        return {"sites": 0, "fused": 0}
    found = subject.arkv.report()
    reasons = Counter(_stable(site["reason"]) for site in found.rows if not site["fused"])
    return {
        "sites": len(found.rows),
        "fused": found.fused,
        "reasons": " | ".join(f"{count}x {reason}" for reason, count in sorted(reasons.items())),
    }


def _status(row: Row) -> str:
    for status in ("wrong", "raised", "refused"):
        if row[status]:
            return status
    if row["sites"] and row["sites"] == row["fused"]:
        return "fused"
    return "partly" if row["fused"] else "unfused"


def _add(row: Row, column: str, *names: str) -> None:
    row[column] = ", ".join(filter(None, [row[column], *names]))


def _stable(reason: str) -> str:
    """A reason without the names of a graph's nodes, which change with every release."""
    return re.sub(r"%\w+ : .*?target=(?:[\w.]*\.)?(\w+)\].*?(?=;|, which|$)", r"\1", reason)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
