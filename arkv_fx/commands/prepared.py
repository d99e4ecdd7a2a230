"""What ``arkv generate`` and ``arkv view`` begin with: a transformed model and a prompt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arkv_fx.commands.common import DType, Lowering, configure, load, load_calibration
from arkv_fx.commands.limits import require_memory, require_positions
from arkv_fx.errors import EvaluationError
from arkv_fx.transforming import transform

COMPILE_WORTHWHILE = 512
"""Tokens from which on compiling pays for itself on a CPU."""


class Prepared(NamedTuple):
    """A transformed model, its tokenizer, the prompt [1, T] int64 and how the graphs run."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: Tensor
    lowering: str


def prepare(
    text: str, tokens: int, *, model: str, compression: float | None, context: int | None,
    budget: int | None, preset: str, calibration: Path | None, compile: Lowering | None,
    dtype: DType, device: str, chat: bool, weights: str | None = None,
) -> Prepared:  # fmt: skip
    """Load a model, transform it and encode a prompt that so many ``tokens`` are to follow.

    Args:
        text: the prompt.
        context: prompt and new tokens unless given.
        compile: chosen by device and length unless given.
        weights: "int8" or "int4" to quantize them, the originals let go.

    Raises:
        EvaluationError: if there is nothing to read, or neither model nor machine has the room.
        ConfigError, CalibrationError, ModelNotFoundError: for what does not fit or is not there.
    """
    network, tokenizer = load(model, dtype, device)
    ids = encode(tokenizer, text, chat).to(network.device)
    total = ids.shape[1] + tokens
    require_positions(network, total)
    config = configure(preset, compression, budget, context or total)
    require_memory(network, config)
    lowering = compile or _lowering(network.device, tokens)
    transform(
        network, config, load_calibration(calibration), compile=lowering, weights=weights,
        keep_weights=weights is None,
    )  # fmt: skip
    return Prepared(network, tokenizer, ids, lowering)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> Tensor:
    """The prompt's token ids [1, T].

    Raises:
        EvaluationError: if there are none, or there is no chat template.
    """
    if chat:
        if not tokenizer.chat_template:
            raise EvaluationError("the model's tokenizer has no chat template: use --no-chat")
        message = [{"role": "user", "content": text}]
        text = str(
            tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        )
    ids: Tensor = tokenizer(
        text, return_tensors="pt", add_special_tokens=not chat, verbose=False
    ).input_ids
    if ids.shape[1] < 1:
        raise EvaluationError("the prompt has 0 tokens: give one at least")
    return ids.long()  # of no text, some tokenizers make numbers of another kind


def _lowering(device: torch.device, tokens: int) -> str:
    if device.type == "cpu" and (tokens < COMPILE_WORTHWHILE or not shutil.which("c++")):
        return "eager"
    return "inductor"
