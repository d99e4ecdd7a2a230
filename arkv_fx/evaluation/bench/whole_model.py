"""``model``: whole decode steps, every method with a cache of its own and the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from arkv_fx.evaluation.bench.caches import decoders, load_model
from arkv_fx.evaluation.bench.cases import Options
from arkv_fx.evaluation.bench.contest import Entrant, compete
from arkv_fx.evaluation.bench.measurements import Measurement, dtype_name

CONTEXTS = (1024, 8192)
WARMUP = 3
"""Untimed steps, the one that compiles included."""


def model(options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    """Tokens per second and cache bytes of one sequence, against the caches of transformers.

    Caches are filled with random keys and values instead of by a prompt: decode time does not
    depend on them, and a long prompt takes minutes on a CPU.
    """
    network = load_model(options)
    return [
        row
        for tokens in options.contexts or CONTEXTS
        for row in _context(network, tokens, options, progress)
    ]


def _context(
    network: PreTrainedModel, tokens: int, options: Options, progress: Callable[[str], None]
) -> list[Measurement]:
    token = torch.zeros(1, 1, dtype=torch.long, device=options.device)
    entrants: list[Entrant] = []
    full: list[str] = []
    for name, make in decoders(network, tokens, options.steps + WARMUP, options).items():
        progress(f"{options.model}: {name}, a cache of {tokens} tokens")
        row = Measurement("model", options.model, name, dtype_name(options.dtype), context=tokens)
        try:
            decoder = make()
        except ImportError as error:
            entrants.append(Entrant(row, partial(_raise, error)))
            continue
        if name.startswith("arkv"):
            row = replace(row, slots=options.config(1024).budget)
        if decoder.full:
            full.append(row.label)
        row = replace(row, bytes=decoder.nbytes())
        entrants.append(Entrant(row, partial(decoder.step, token)))

    def feed(results: Mapping[str, Any]) -> None:
        """Everyone's next token is the one that the plain full cache finds likeliest."""
        token.copy_(results[f"dynamic-eager@{tokens}"].argmax(-1, keepdim=True))

    rows = [
        row if row.median_us is None else replace(row, tokens_per_s=1e6 / row.median_us)
        for row in compete(entrants, options, progress, options.steps, WARMUP - 1, feed)
    ]
    baselines = [row for row in rows if not row.method.startswith("arkv")]
    fastest = max(
        (row for row in baselines if row.label in full and row.tokens_per_s is not None),
        key=lambda row: row.tokens_per_s or 0.0,
    )
    best = replace(fastest, method="fastest full cache")
    return [row if row in baselines else row.against([best, *baselines]) for row in rows]


def _raise(error: Exception) -> None:
    raise error
