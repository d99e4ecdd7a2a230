"""What is asked of one architecture, and the row of answers."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ArkvError, ModelNotFoundError
from arkv_fx.evaluation.results import Row
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.layers import tensors_of
from arkv_fx.huggingface.model_caches import is_encoder_decoder, new_cache
from arkv_fx.huggingface.transformed import Transformed
from arkv_fx.report import Report
from arkv_fx.transforming import restore, transform
from arkv_fx.zoo import drive
from arkv_fx.zoo.changes import NOT_CACHEABLE
from arkv_fx.zoo.configs import tiny_model
from arkv_fx.zoo.drive import CHUNKED, STEPWISE
from arkv_fx.zoo.outcome import VISIBLE, blank, is_wrong, note, status_of

ROOMY = ArkvConfig(budget=128, tiers=("native",))
SMALL = ArkvConfig(budget=24, window=6, sinks=2, tiers=("int8", "int4"))


@dataclass
class Subject:
    """A tiny model with what it answered before it was transformed."""

    model: PreTrainedModel
    batches: dict[str, drive.Batch]
    logits: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None

    @property
    def arkv(self) -> Transformed:
        """What ``transform`` put on the model."""
        found: Transformed = self.model.arkv  # type: ignore[assignment]
        return found

    def error(self, pieces: tuple[int, ...], expected: str) -> float:
        """Relative error of the transformed model on the single sequence."""
        batch = self.batches["single"]
        found = drive.logits(self.model, batch, pieces, new_cache(self.model))
        return drive.difference(found, self.logits[expected], batch.mask)


def examine(name: str, *, quick: bool = False) -> Row:
    """One row about the architecture ``name``; whatever goes wrong is in the row.

    ``quick`` leaves out chunks and eviction: their columns are None.
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
        model = tiny_model(name)
        subject = Subject(model, drive.batches(is_encoder_decoder(model)))
    except (ModelNotFoundError, RuntimeError) as error:
        row["error"] = _text(error)
        return "not built"
    try:
        row |= _as_it_was(subject)
    except Exception as error:
        row["error"] = _text(error)
        return "no reference"
    if not row["control"] > VISIBLE:
        return "blind"
    for config, checks in [(ROOMY, _ROOMY_QUICK if quick else _ROOMY), (SMALL, _SMALL)]:
        if not (quick and config is SMALL):
            _under(subject, config, checks, row)
    return status_of(row)


def _as_it_was(subject: Subject) -> Row:
    """Answers of the model with its own cache, and what that and its loss change."""
    model, single = subject.model, subject.batches["single"]
    expected = drive.logits(model, single, STEPWISE, drive.own_cache(model))
    subject.logits["single"] = expected
    at_once = drive.logits(model, single, drive.AT_ONCE, None)
    forgetful = drive.logits(model, single, STEPWISE, None)
    unasked = []  # what the model itself cannot do is not asked of us
    if not _reads_padding(subject):
        unasked.append("padded")
    if not _reads_chunks(subject):
        unasked.append("chunked")
    return {
        "own": drive.difference(expected, at_once, single.mask),
        "control": drive.difference(forgetful, expected, single.mask),
        "unasked": ", ".join(unasked),
    }


def _reads_padding(subject: Subject) -> bool:
    """Whether the model as it was generates from a padded batch what it does without a cache."""
    model, padded = subject.model, subject.batches["padded"]
    try:
        tokens, logits = drive.generate(model, padded)
    except Exception:
        return False
    with suppress(Exception):  # some cannot do without a cache
        _, whole = drive.generate(model, padded, use_cache=False)
        if drive.difference(whole[:, :2], logits[:, :2]) > VISIBLE:
            return False
    subject.tokens, subject.logits["padded"] = tokens, logits
    return True


def _reads_chunks(subject: Subject) -> bool:
    """Whether the model as it was reads a prompt in chunks as it reads it at once."""
    model, single = subject.model, subject.batches["single"]
    try:
        chunked = drive.logits(model, single, CHUNKED, drive.own_cache(model))
    except Exception:
        return False
    same = drive.difference(chunked, subject.logits["single"], single.mask) < VISIBLE
    if same:
        subject.logits["chunked"] = chunked
    return same


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
            note(row, "refused" if isinstance(error, ArkvError) else "raised", name)
            row["error"] = row["error"] or f"{name}: {_text(error)}"
            if name == "transform":
                return
        else:
            row |= found
            note(row, "wrong", *(c for c, value in found.items() if is_wrong(c, value)))
    if config is ROOMY:
        row |= _report(subject)
    restore(subject.model)


def _transform(subject: Subject, config: ArkvConfig) -> Row:
    transform(subject.model, config, False, compile="eager")
    return {}


def _identity(subject: Subject) -> Row:
    return {"identity": subject.error(STEPWISE, "single")}


def _padded(subject: Subject) -> Row:
    """``generate()`` on a padded batch."""
    found: Row = {"padded": None, "generate": None}
    if subject.tokens is not None:
        tokens, logits = drive.generate(subject.model, subject.batches["padded"])
        found["padded"] = drive.difference(logits, subject.logits["padded"])
        found["generate"] = torch.equal(tokens, subject.tokens)
    found["graphs"] = subject.arkv.backend.graphs
    found["breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return found


def _chunked(subject: Subject) -> Row:
    known = "chunked" in subject.logits
    return {"chunked": subject.error(CHUNKED, "chunked") if known else None}


def _evict(subject: Subject) -> Row:
    """Two runs under a budget that does not hold the prompt."""
    single, model = subject.batches["single"], subject.model
    caches = [new_cache(model), new_cache(model)]
    first, second = [drive.logits(model, single, STEPWISE, cache) for cache in caches]
    report = subject.arkv.report()
    bounded = None
    if all(site["fused"] for site in _cached_sites(report)):  # what is not fused keeps everything
        shorter = new_cache(model)
        drive.logits(model, single, STEPWISE[:2], shorter)
        sizes = {_compressed_bytes(cache) for cache in (shorter, *caches)}
        bounded = sizes == {report.nbytes}
    return {
        "finite": bool(first.isfinite().all()),
        "bounded": bounded,
        "repeatable": torch.equal(first, second),
        "moved": drive.difference(first, subject.logits["single"], single.mask),
    }


def _compressed_bytes(cache: Any) -> int:
    """What a cache holds, without recurrent states and cross-attention, which do not grow."""
    ours: ArkvCache = getattr(cache, "self_attention_cache", cache)
    recurrent = [t for layer in ours.layers if _is_recurrent(layer) for t in tensors_of(layer)]
    return ours.nbytes() - ours.handle.nbytes - sum(t.untyped_storage().nbytes() for t in recurrent)


def _is_recurrent(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)


_ROOMY_QUICK: dict[str, Check] = {"identity": _identity, "padded": _padded}
_ROOMY: dict[str, Check] = {**_ROOMY_QUICK, "chunked": _chunked}
_SMALL: dict[str, Check] = {"evict": _evict}


def _cached_sites(report: Report) -> list[Row]:
    """Attention over a cache of ours; that of an encoder or over it has none."""
    return [site for site in report.rows if site["source"] == "marker"]


def _report(subject: Subject) -> Row:
    sites: list[Row] = []
    if subject.arkv.backend.sites:
        sites = _cached_sites(subject.arkv.report())
    reasons = Counter(_stable(site["reason"]) for site in sites if not site["fused"])
    return {
        "sites": len(sites),
        "fused": sum(bool(site["fused"]) for site in sites),
        "reasons": " | ".join(f"{count}x {reason}" for reason, count in sorted(reasons.items())),
    }


def _stable(reason: str) -> str:
    """A reason without the names of nodes and sizes, which change with every release."""
    node = r"%\w+ : \[num_users=\d+\] = \w+\[target=(?:[\w.]*\.)?(\w+)\]"
    arguments = r"(?:\(args = .*?kwargs = \{[^{}]*\}\))?"
    return re.sub(r"\bs\d+\b", "n", re.sub(node + arguments, r"\1", reason))


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
