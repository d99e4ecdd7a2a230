"""Reading one sequence with a tiny model: piece by piece with a cache, or by ``generate()``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from arkv_fx.huggingface.model_caches import is_encoder_decoder

PROMPT, STEPS = 40, 6  # longer than the windows of the tiny models
STEPWISE = (PROMPT, *[1] * STEPS)
CHUNKED = (17, 16, PROMPT - 33, *[1] * STEPS)
AT_ONCE = (PROMPT + STEPS,)
SOURCE, HIDDEN = 20, 64  # what an encoder makes

WHOLE_IDS = ("cpmant",)  # these drop the cached prefix of their input themselves


@dataclass(frozen=True)
class Batch:
    """Token ids and mask [B, PROMPT + STEPS] int64; padding is to the left and has id 0.

    ``source`` [B, SOURCE, hidden] is what an encoder made of its input, which ``source_mask`` pads
    then in place of the decoder's tokens.
    """

    ids: Tensor
    mask: Tensor
    source: Tensor
    source_mask: Tensor


def batches(encoder: bool = False) -> dict[str, Batch]:
    """A single sequence, and two of which the second is padded (in its source, if it has one)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 128, (2, PROMPT + STEPS), generator=generator)
    source = torch.randn(2, SOURCE, HIDDEN, generator=generator)
    mask, source_mask = torch.ones_like(ids), torch.ones(2, SOURCE, dtype=torch.long)
    single = Batch(ids[:1], mask[:1], source[:1], source_mask[:1])
    if encoder:
        source_mask[1, :7] = 0
    else:
        mask[1, :13] = 0
    return {"single": single, "padded": Batch(ids * mask, mask, source, source_mask)}


@dataclass
class Encoded(ModelOutput):
    """What an encoder gives to its decoder, with the fields that any of them is asked for."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_mask: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_probs: tuple[Tensor, ...] | None = None


def own_cache(model: PreTrainedModel) -> Any:
    """The cache that ``generate()`` makes for the model as it is."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return EncoderDecoderCache(cache, DynamicCache()) if is_encoder_decoder(model) else cache


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Batch, pieces: Sequence[int], cache: Any) -> Tensor:
    """Logits [B, tokens, vocabulary] of the sequence read in ``pieces`` of so many tokens.

    With the ``cache`` None each piece is read as if nothing had come before it, though at its
    place in the sequence.
    """
    prefix, fixed = ("decoder_", _source(batch)) if is_encoder_decoder(model) else ("", {})
    accepted = inspect.signature(model.forward).parameters
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    whole = model.config.model_type in WHOLE_IDS and cache is not None
    out: list[Tensor] = []
    start = 0
    for piece in pieces:
        end = start + piece
        inputs: dict[str, Any] = {
            f"{prefix}input_ids": batch.ids[:, 0 if whole else start : end],
            f"{prefix}attention_mask": batch.mask[:, start if cache is None else 0 : end],
            f"{prefix}position_ids": positions[:, start:end],
        }
        known = {name: value for name, value in inputs.items() if name in accepted}
        out.append(model(**fixed, **known, past_key_values=cache, use_cache=True).logits)
        start = end
    return torch.cat(out, 1)


def _source(batch: Batch) -> dict[str, Any]:
    encoded = Encoded(last_hidden_state=batch.source, attention_mask=batch.source_mask)
    return {"encoder_outputs": encoded, "attention_mask": batch.source_mask}


@torch.no_grad()
def generate(model: PreTrainedModel, batch: Batch, use_cache: bool = True) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, STEPS + 1] after the prompt or source, and their logits [B, ., V]."""
    inputs: dict[str, Any] = _source(batch)
    if not is_encoder_decoder(model):
        inputs = {
            "input_ids": batch.ids[:, :PROMPT], "attention_mask": batch.mask[:, :PROMPT],
        }  # fmt: skip
    call: Any = model.generate
    out = call(
        **inputs, max_new_tokens=STEPS + 1, do_sample=False, output_logits=True,
        return_dict_in_generate=True, use_cache=use_cache,
    )  # fmt: skip
    return out.sequences[:, -STEPS - 1 :], torch.stack(out.logits, 1)


def difference(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference at real tokens, relative to the largest logit there; NaN if there is.

    Both are [B, tokens, vocabulary], the mask [B, tokens].
    """
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    return float((found - expected).abs().max() / expected.abs().max())
