"""Reading one sequence with a tiny model: piece by piece with a cache, or by ``generate()``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

PROMPT, STEPS = 40, 6  # longer than the windows of the tiny models
STEPWISE = (PROMPT, *[1] * STEPS)
CHUNKED = (17, 16, PROMPT - 33, *[1] * STEPS)
AT_ONCE = (PROMPT + STEPS,)
NEW_TOKENS = 8

WHOLE_IDS = ("cpmant",)  # these drop the cached prefix of their input themselves


@dataclass(frozen=True)
class Batch:
    """Token ids and mask [B, PROMPT + STEPS] int64; padding is to the left and has id 0."""

    ids: Tensor
    mask: Tensor


def batches() -> dict[str, Batch]:
    """A single sequence, and two of which the second is padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 128, (2, PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    return {"single": Batch(ids[:1], mask[:1]), "padded": Batch(ids * mask, mask)}


def own_cache(model: PreTrainedModel) -> Any:
    """The cache that ``generate()`` makes for the model as it is."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Batch, pieces: Sequence[int], cache: Any) -> Tensor:
    """Logits [B, tokens, vocabulary] of the sequence read in ``pieces`` of so many tokens.

    With the ``cache`` None each piece is read as if nothing had come before it, though at its
    place in the sequence.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    out: list[Tensor] = []
    start = 0
    for piece in pieces:
        end = start + piece
        forgets = cache is None
        whole = model.config.model_type in WHOLE_IDS and not forgets
        inputs: dict[str, Any] = {
            "input_ids": batch.ids[:, 0 if whole else start : end],
            "attention_mask": batch.mask[:, start if forgets else 0 : end],
            "past_key_values": cache,
            "use_cache": True,
        }
        if takes_positions:
            inputs["position_ids"] = positions[:, start:end]
        out.append(model(**inputs).logits)
        start = end
    return torch.cat(out, 1)


@torch.no_grad()
def generate(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Greedy tokens [B, NEW_TOKENS] after the prompt."""
    ids, mask = batch.ids[:, :PROMPT], batch.mask[:, :PROMPT]
    call: Any = model.generate
    out: Tensor = call(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[:, PROMPT:]


def difference(found: Tensor, expected: Tensor, batch: Batch) -> float:
    """Largest difference at real tokens, relative to the largest logit there; NaN if there is."""
    real = batch.mask.bool()
    return float((found - expected)[real].abs().max() / expected[real].abs().max())
