"""Attention over keys and values in full precision: a prompt's, or those of all columns.

Models with multi-head latent attention compute these from what is cached, for every column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from arkv_fx.formats import get_format
from arkv_fx.kernels.softmax import (
    Knobs,
    allowed,
    cap,
    group,
    hide_new,
    hide_slots,
    key_logits,
    softmax,
    value_sum,
)
from arkv_fx.plan import LayerPlan
from arkv_fx.state.view import View


def attend_computed(
    q: Tensor, pair: Sequence[Tensor], mask: Tensor | None, held: View, knobs: Knobs,
    query_pos: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A kernel's output and probabilities; ``pair`` are the keys and values of all columns."""
    plan = held.plan
    length = pair[0].shape[2] - plan.slots
    offset = held.seen + length - (mask.shape[-1] if mask is not None else 0)
    logits = _logits(q, pair[0], plan, knobs)
    old, own = logits.split([plan.slots, length], -1)
    old = hide_slots(old, held.pos, query_pos, mask, offset, plan.sliding)
    own = hide_new(own, mask, plan, query_pos)
    probs = softmax(torch.cat([old, own], -1), knobs.sink_logits)
    return _sum(probs, pair[1], plan), probs


def attend_prompt(
    q: Tensor, pair: Sequence[Tensor], mask: Tensor | None, plan: LayerPlan, knobs: Knobs,
    query_pos: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fused attention over a prompt's keys and values, the ``pair``.

    Only the last W queries' probabilities are written out.
    """
    one = q.shape[2] == 1
    # The last min(W, T) queries, without a branch on a symbolic T.
    watched_pos = query_pos[:, -plan.window :]
    part = mask[..., -plan.window :, :] if mask is not None else None
    logits = _logits(q[:, :, -plan.window :], pair[0], plan, knobs)
    if mask is None and not plan.sliding and knobs.sink_logits is None and not one:
        # All but their own columns are visible to all of them, and every one of them sees itself.
        own = logits[..., -plan.window :]
        later = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).triu(1)
        own.masked_fill_(later, float("-inf"))
        probs = torch.softmax(logits, -1, out=logits)  # fresh memory costs more than the sums
    else:
        probs = softmax(hide_new(logits, part, plan, watched_pos), knobs.sink_logits)
    if knobs.softcap or knobs.sink_logits is not None or (plan.sliding and mask is None):
        full = hide_new(_logits(q, pair[0], plan, knobs), mask, plan, query_pos)
        return _sum(softmax(full, knobs.sink_logits), pair[1], plan), probs
    out = scaled_dot_product_attention(
        q, pair[0], pair[1], attn_mask=mask, is_causal=mask is None and not one, scale=knobs.scale,
        enable_gqa=q.shape[1] != pair[0].shape[1],
    )  # fmt: skip
    # A row with nothing to attend to is defined as zeros; fused kernels differ on it.
    if mask is not None:
        out = out.masked_fill(~allowed(mask).any(-1, keepdim=True), 0.0)
    return group(out, plan.heads), probs


def _logits(q: Tensor, keys: Tensor, plan: LayerPlan, knobs: Knobs) -> Tensor:
    """Unmasked logits [B, Hkv, G, T, N], float32; ``keys`` [B, Hx, N, Dx] may have more heads."""
    native = get_format("native")
    scaled = group(q.detach().float() * knobs.scale, keys.shape[1])
    logits = key_logits(scaled, native.key, [keys.detach()], keys.shape[-1])
    return cap(group(logits.flatten(1, 2), plan.heads), knobs)


def _sum(probs: Tensor, values: Tensor, plan: LayerPlan) -> Tensor:
    """Output [B, Hkv, G, T, Dx] from probabilities [B, Hkv, G, T, N]."""
    split = group(probs.flatten(1, 2), values.shape[1])
    out = value_sum(split, get_format("native").value, [values], values.shape[-1])
    return group(out.flatten(1, 2), plan.heads)
