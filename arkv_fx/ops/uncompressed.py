"""Attention over keys and values in full precision: a prompt's, or those of all columns.

Models with multi-head latent attention compute these from what is cached, for every column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from arkv_fx.kernels.softmax import Knobs, allowed, group, hide_new, softmax
from arkv_fx.ops.blocks import (
    attend_in_blocks,
    columns_logits,
    columns_sum,
    fits,
    hide_columns,
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
    logits = columns_logits(q, pair[0], plan, knobs)
    logits = hide_columns(logits, held.positions, query_pos, mask, offset, plan)
    probs = softmax(logits, knobs.sink_logits)
    return columns_sum(probs, pair[1], plan), probs


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
    logits = columns_logits(q[:, :, -plan.window :], pair[0], plan, knobs)
    if mask is None and not plan.sliding and knobs.sink_logits is None and not one:
        # All but their own columns are visible to all of them, and every one of them sees itself.
        own = logits[..., -plan.window :]
        later = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).triu(1)
        own.masked_fill_(later, float("-inf"))
        probs = torch.softmax(logits, -1, out=logits)  # fresh memory costs more than the sums
    else:
        probs = softmax(hide_new(logits, part, plan, watched_pos), knobs.sink_logits)
    if knobs.softcap or knobs.sink_logits is not None or (plan.sliding and mask is None):
        batch, heads, length, _ = q.shape
        if not fits(length, length, batch, heads):
            nothing = query_pos[:, 0]  # no slots, whose columns it would find
            return attend_in_blocks(q, pair, None, mask, nothing, query_pos, plan, knobs), probs
        full = hide_new(columns_logits(q, pair[0], plan, knobs), mask, plan, query_pos)
        return columns_sum(softmax(full, knobs.sink_logits), pair[1], plan), probs
    out = scaled_dot_product_attention(
        q, pair[0], pair[1], attn_mask=mask, is_causal=mask is None and not one, scale=knobs.scale,
        enable_gqa=q.shape[1] != pair[0].shape[1],
    )  # fmt: skip
    # A row with nothing to attend to is defined as zeros; fused kernels differ on it.
    if mask is not None:
        out = out.masked_fill(~allowed(mask).any(-1, keepdim=True), 0.0)
    return group(out, plan.heads), probs
