"""Sample prompts of a calibration: what is given is what the model can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arkv_fx import texts
from arkv_fx.errors import CalibrationError
from arkv_fx.huggingface.layers import most_positions, text_config
from arkv_fx.options import short


def read_samples(
    model: nn.Module, input_ids: Any, attention_mask: Any
) -> list[tuple[Tensor, Tensor | None]]:
    """Each prompt [B, T] with its mask [B, T], or None.

    Raises:
        CalibrationError: for what is no prompt of this model, saying which and why.
    """
    prompts = _list("input_ids", input_ids)
    masks = [None] * len(prompts) if attention_mask is None else _list("mask", attention_mask)
    if len(masks) == 1 < len(prompts) and isinstance(attention_mask, Tensor):
        masks *= len(prompts)
    if not prompts or len(masks) != len(prompts):
        raise CalibrationError(
            f"{len(prompts)} prompts and {len(masks)} attention masks were given: give at least "
            "one prompt, and one attention mask for each or none"
        )
    for index, (prompt, mask) in enumerate(zip(prompts, masks, strict=True)):
        which = f"input_ids[{index}]" if len(prompts) > 1 else "input_ids"
        _check_prompt(model, which, prompt)
        if mask is not None:
            _check_mask(which, prompt, mask)
    return list(zip(prompts, masks, strict=True))


TEXT = "esther"
"""The shipped text that is calibrated on: our reports measure on the others."""


def shipped_sample(model: nn.Module, tokenizer: Callable[..., Any], tokens: int) -> Tensor:
    """Token ids [1, T] of a shipped text: ``tokens``, or fewer where text or model end before.

    Raises:
        CalibrationError: if that is no tokenizer.
    """
    try:
        ids = tokenizer(texts.read(TEXT), return_tensors="pt", verbose=False)["input_ids"]
    except (TypeError, KeyError) as error:
        raise CalibrationError(
            f"tokenizer={short(tokenizer)}: give a tokenizer of transformers, or prompts as "
            f"input_ids ({error})"
        ) from error
    most = getattr(text_config(model), "max_position_embeddings", None) or tokens
    weight = next(model.parameters())
    sample: Tensor = ids[:, : min(tokens, most)].to(weight.device)
    return sample


def _list(name: str, given: Any) -> list[Any]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, Mapping):
        raise CalibrationError(
            f"{name} is a {type(given).__name__}: give its tensor, as encoding['input_ids']"
        )
    if not isinstance(given, (list, tuple)):
        raise CalibrationError(f"{name}={short(given)}: give a tensor [B, T] or a list of them")
    return list(given)


def _check_prompt(model: nn.Module, which: str, prompt: Any) -> None:
    if not isinstance(prompt, Tensor):
        raise CalibrationError(f"{which}={short(prompt)}: give a tensor [B, T] of token ids")
    if prompt.dim() != 2 or len(prompt) < 1 or prompt.shape[1] < 2:
        raise CalibrationError(
            f"{which}: a prompt has shape {tuple(prompt.shape)}; [batch, tokens >= 2] is needed"
        )
    if prompt.dtype not in (torch.int64, torch.int32):
        raise CalibrationError(f"{which} is {prompt.dtype}: token ids are torch.int64 or int32")
    positions = most_positions(model)
    if positions is not None and prompt.shape[1] > positions:
        raise CalibrationError(
            f"{which} has {prompt.shape[1]} tokens, and the model has positions for {positions}: "
            "give a shorter prompt"
        )
    table = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(table, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if prompt.device != weight.device and not hasattr(model, "hf_device_map"):
        raise CalibrationError(
            f"{which} is on {prompt.device} and the model on {weight.device}: "
            f"call input_ids.to({str(weight.device)!r})"
        )
    least, most = int(prompt.min()), int(prompt.max())
    if least < 0 or most >= weight.shape[0]:
        raise CalibrationError(
            f"{which} holds the token id {least if least < 0 else most}: the model has a "
            f"vocabulary of {weight.shape[0]}; was it made by another tokenizer?"
        )


def _check_mask(which: str, prompt: Tensor, mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.shape != prompt.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else short(mask)
        raise CalibrationError(
            f"the attention mask of {which} is {shape}: give a tensor {tuple(prompt.shape)} with 0 "
            "for padding"
        )
    if mask.device != prompt.device:
        raise CalibrationError(
            f"{which} is on {prompt.device} and its attention mask on {mask.device}"
        )
    if not bool(mask.bool().any(1).all()):
        raise CalibrationError(f"{which}: a row of its attention mask hides every token")
