"""What is asked of one architecture."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

PROMPT, STEPS = 40, 6  # longer than the windows of the tiny models
WHOLE_IDS = ("cpmant",)  # these drop the cached prefix of their input themselves


def batches() -> dict[str, tuple[Tensor, Tensor]]:
    """(ids, mask) [B, PROMPT + STEPS] int64 of a single sequence and of a left-padded batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 128, (2, PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    return {"single": (ids[:1], mask[:1]), "padded": (ids * mask, mask)}


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    pieces: list[int],
    cache: Any = None,
    drop: bool = False,
) -> Tensor:
    """Logits [B, tokens, vocabulary] of the sequence read piece by piece.

    Without a ``cache`` the model makes its own; with ``drop`` it is forgotten after each piece.
    """
    accepts = inspect.signature(model.forward).parameters
    if cache is None and not drop:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out, start = [], 0
    for piece in pieces:
        end = start + piece
        first = 0 if model.config.model_type in WHOLE_IDS and not drop else start
        inputs: dict[str, Any] = {"input_ids": ids[:, first:end], "use_cache": True}
        inputs["attention_mask"] = mask[:, start:end] if drop else mask[:, :end]
        if "position_ids" in accepts:
            inputs["position_ids"] = positions[:, start:end]
        answer = model(**inputs, past_key_values=cache)
        out.append(answer.logits)
        start = end
    return torch.cat(out, 1)


def difference(found: Tensor, expected: Tensor, mask: Tensor) -> float:
    """Largest difference at real tokens, relative to the largest logit there."""
    real = mask.bool()
    return float((found - expected)[real].abs().max() / expected[real].abs().max())
