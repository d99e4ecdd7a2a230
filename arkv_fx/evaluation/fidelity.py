"""Fidelity: how far a compressed cache moves a model's predictions from those of the full one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.calibrations import calibrations
from arkv_fx.evaluation.methods import FullCache, Setting, get_method, make_config
from arkv_fx.evaluation.results import Row
from arkv_fx.evaluation.shared_prefill import Contest

DEFAULT_METHODS = ("full", "evict", "uniform-int8", "uniform-int4", "paper-512", "default")


@dataclass(frozen=True)
class Entry:
    """One method at one compression (None: the method has its own size)."""

    method: str
    compression: float | None

    @property
    def name(self) -> str:
        """Unique among the entries of a run."""
        return f"{self.method}@{self.compression}"


def entries(methods: Sequence[str], compressions: Sequence[float]) -> list[Entry]:
    """Every method at every compression; one that has its own size only once."""
    out: list[Entry] = []
    for method in dict.fromkeys(methods):
        sizes = compressions if get_method(method).sized else [None]
        out += [Entry(method, size) for size in dict.fromkeys(sizes)]
    return out


def make_configs(
    chosen: Sequence[Entry], full: FullCache, context: int, steps: int
) -> dict[str, ArkvConfig]:
    """The configuration of each entry by its name, for equal bytes per layer."""
    size = full.per_layer(context)
    return {
        entry.name: make_config(
            entry.method, Setting(context, steps, int(size / (entry.compression or 1)), full.exact)
        )
        for entry in chosen
    }


def fidelity(
    model: nn.Module,
    texts: Mapping[str, Tensor],
    *,
    context: int,
    steps: int,
    compressions: Sequence[float] = (4.0,),
    methods: Sequence[str] = DEFAULT_METHODS,
    calibration: Calibration | None = None,
    name: str = "",
    compile: str = "eager",
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Prefill ``context`` tokens, then ``steps`` teacher-forced tokens, one at a time.

    All texts go in one batch. The reference is the untransformed model, run once over all tokens.

    Args:
        model: a causal language model that is not transformed, in eval mode.
        texts: token ids by name, each [T] int64 with T > context + steps.
        calibration: used by the methods that take one; None: they are calibrated as
            ``transform(model)`` does it by itself, on the prompts.
        compressions: bytes of a bf16 cache at ``context`` tokens divided by those allowed.
        name: what the rows call the model.
        progress: called with what is done next.

    Returns:
        One row per text, method and compression: ``kl_mean`` in nats is KL(full || method) and
        ``top1`` the agreement of the likeliest token, both means over steps; ``ppl_ratio`` is
        perplexity(method) / perplexity(full); ``bytes`` are measured, per sequence, in the
        model's dtype, ``full_bytes`` those of a full bf16 cache at ``context`` tokens;
        ``seconds`` is the median time of a step of the whole batch.

    Raises:
        EvaluationError: if a text is too short.
        ConfigError: for a method or size that cannot work.
    """
    ids = _batch(texts, context + steps + 1).to(next(model.parameters()).device)
    full = FullCache.of(model)
    chosen = entries(methods, compressions)
    configs = make_configs(chosen, full, context, steps)
    progress(f"full cache: {ids.shape[0]} x {context + steps} tokens")
    reference = _reference(model, ids[:, :-1], steps)
    rows: list[Row] = []
    by_entry = calibrations(
        model, ids[:, :context], configs, {e.name: e.method for e in chosen}, calibration
    )
    with Contest(model, configs, by_entry, compile=compile) as contest:
        progress(f"prefill: {ids.shape[0]} x {context} tokens, {len(chosen)} caches")
        _, caches = contest.prefill(ids[:, :context])
        for entry in chosen:
            progress(f"{entry.method}, compression {entry.compression}: {steps} steps")
            cache = caches.pop(entry.name)
            times: list[float] = []
            found: list[Tensor] = []
            for step in range(steps):
                start = time.perf_counter()
                token = ids[:, context + step, None]
                logits = contest.step(entry.name, token, cache)
                times.append(time.perf_counter() - start)
                target = ids[:, context + step + 1]
                found.append(_compare(reference[:, step], logits, target))
            measured = torch.stack(found).mean(0)
            for index, text in enumerate(texts):
                kl, top1, nll = measured[:, index].tolist()
                rows.append(
                    {
                        "model": name,
                        "text": text,
                        "method": entry.method,
                        "compression": entry.compression,
                        "context": context,
                        "steps": steps,
                        "bytes": cache.nbytes() // ids.shape[0],
                        "full_bytes": full.nbytes(context),
                        "kl_mean": kl,
                        "top1": top1,
                        "ppl_ratio": float(torch.tensor(nll).exp()),
                        "seconds": statistics.median(times),
                    }
                )
    return rows


def means(rows: Sequence[Row]) -> list[Row]:
    """Rows of ``fidelity`` averaged over texts, in order of method and compression."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["compression"]), []).append(row)
    out = []
    for group in groups.values():
        average = {n: statistics.fmean(r[n] for r in group) for n in ("kl_mean", "top1")}
        ratio = statistics.geometric_mean(r["ppl_ratio"] for r in group)
        text = f"mean of {len(group)}"
        out.append({**group[0], "text": text, **average, "ppl_ratio": ratio})
    return out


def _batch(texts: Mapping[str, Tensor], length: int) -> Tensor:
    """The first ``length`` tokens of every text, [texts, length]."""
    if not texts:
        raise EvaluationError("no text to measure on")
    for name, ids in texts.items():
        if ids.shape[-1] < length:
            raise EvaluationError(
                f"the text {name!r} has {ids.shape[-1]} tokens; context + steps + 1 = {length} "
                "are needed: give a longer text, a smaller context or fewer steps"
            )
    return torch.stack([ids.flatten()[:length] for ids in texts.values()])


@torch.no_grad()
def _reference(model: nn.Module, ids: Tensor, steps: int) -> Tensor:
    """Log-probabilities [B, steps, vocabulary] after each of the last ``steps`` tokens."""
    rows = [model(input_ids=row[None], use_cache=False, logits_to_keep=steps).logits for row in ids]
    return torch.cat(rows).double().log_softmax(-1)


def _compare(reference: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """[3, B] of one step: KL, agreement of the top token, difference of the target's NLL.

    Args:
        reference: [B, vocabulary] log-probabilities; logits: likewise; target: [B] int64.
    """
    ours = logits.double().log_softmax(-1)
    kl = (reference.exp() * (reference - ours)).sum(-1)
    top1 = (reference.argmax(-1) == ours.argmax(-1)).double()
    worse = (reference - ours).gather(-1, target[:, None])[:, 0]
    return torch.stack([kl, top1, worse])
