"""transformers' attention interface, led to what the passes can read.

Flex and flash attention are closed to the passes. While one of our caches is in use, a model that
asks for them gets the implementation ``"arkv"`` instead: ``arkv::attention`` where logits are
soft-capped or have sinks, which SDPA cannot express, and SDPA elsewhere. Eager attention stays: a
model may do there what it tells no interface, and ``find_softmax`` reads what it really does.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)

NAME = "arkv"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; query [B, Hq, T, D], key and value [B, Hkv, S, D]."""
    if softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return out, None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = query.shape[2] > 1 and attention_mask is None and causal
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = torch.ops.arkv.attention(
        query, key, value, attention_mask, causal, scale, softcap or 0.0, s_aux
    )
    return out.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of transformers: ``sdpa_mask``, and none where causality says it all.

    ``sdpa_mask`` leaves it out, too, but not in a graph that is being traced by torch before 2.13
    (where ``torch.compiler.is_exporting()`` is true in every graph) or by transformers 5.17. Then
    each decoded token would have a mask, which grows with the text.
    """
    local = local_size is not None and kv_length >= local_size
    if attention_mask is None and allow_is_causal_skip and not local:
        if q_length == 1 or q_length == kv_length:
            return None
    made: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs,
    )  # fmt: skip
    return made


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


@contextmanager
def masks_left_out() -> Generator[None]:
    """Within it models of SDPA attention make their masks by ``mask``."""
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    if before is not sdpa_mask:  # another library's, or ours already
        yield
        return
    AttentionMaskInterface.register("sdpa", mask)
    try:
        yield
    finally:
        AttentionMaskInterface.register("sdpa", before)


@contextmanager
def closed_replaced(config: Any) -> Generator[None]:
    """Within it a configuration that asks for flex or flash attention asks for ours."""
    before = getattr(config, "_attn_implementation_internal", None)
    if not isinstance(before, str) or not before.startswith(("flex_", "flash_")):
        yield
        return
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
