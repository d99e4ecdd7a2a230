"""What a model and a machine can hold, asked before anything is computed."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel

from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ConfigError, EvaluationError
from arkv_fx.evaluation.methods import FullCache
from arkv_fx.huggingface.layers import most_positions

LARGE = 1 << 17
"""Tokens in a cache from which on it is asked whether memory holds them."""


def require_positions(model: PreTrainedModel, tokens: int) -> None:
    """Refuse more tokens than a model with a table of positions has a row for.

    Raises:
        EvaluationError: saying how many there are.
    """
    most = most_positions(model)
    if most is not None and tokens - 1 > most:  # the last token is never fed
        raise EvaluationError(
            f"prompt and new tokens are {tokens}, and the model has positions for {most}: give a "
            "shorter prompt or a smaller --max-new-tokens"
        )


def require_memory(model: PreTrainedModel, config: ArkvConfig) -> None:
    """Refuse a cache that the machine cannot hold: torch would be killed without a word.

    Raises:
        EvaluationError: saying what it would take.
    """
    tokens = config.budget or config.context
    if tokens < LARGE:
        return
    try:
        full = FullCache.of(model).nbytes(tokens)
    except ConfigError:  # it holds no keys and values
        return
    if config.budget:  # the cheapest format takes more than a fifth of 16 bits
        least = full / 5
    else:
        least = full / (config.compression or 1) * model.dtype.itemsize / 2
    if model.device.type == "cuda":
        there = torch.cuda.mem_get_info(model.device)[1]
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if least > there:
        raise EvaluationError(
            f"a cache for {tokens} tokens would take {least / 2**30:.0f} GiB and more, and there "
            f"are {there / 2**30:.0f} GiB of memory: lower --budget or --context"
        )
