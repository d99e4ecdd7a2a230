"""Fused attention of many new tokens: to the slots, and causally among themselves, then joined.

Both halves are fused attention that also gives the logarithm of its sum of exponentials, by which
two softmaxes over different columns become one (as in ring attention, arXiv 2310.01889).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arkv_fx.kernels.softmax import Knobs, allowed, group
from arkv_fx.plan import LayerPlan

# What ``scaled_dot_product_attention`` calls on a CPU; it keeps the second result to itself.
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def comes_in_halves(
    q: Tensor, pair: Sequence[Tensor], mask: Tensor | None, plan: LayerPlan, knobs: Knobs
) -> bool:
    """Whether each slot is seen by all queries or by none, and fused attention can say it."""
    plain = not plan.sliding and not knobs.softcap and knobs.sink_logits is None
    known = q.is_cpu and plan.slots > 0 and pair[0].shape[-1] == pair[1].shape[-1]
    return plain and known and (mask is None or _known_causal(mask))


_seen = threading.local()


def _known_causal(mask: Tensor) -> bool:
    """``_only_causal``, looked at once where all layers of a call have the same mask."""
    if type(mask) is not Tensor or mask.is_inference():  # it does not say when it is written to
        return _only_causal(mask)
    known: tuple[Any, int, bool] | None = getattr(_seen, "last", None)
    if known is None or known[0]() is not mask or known[1] != mask._version:
        known = _seen.last = (weakref.ref(mask), mask._version, _only_causal(mask))
    return known[2]


def _only_causal(mask: Tensor) -> bool:
    """Whether a mask [B or 1, Hq or 1, T, S] hides what comes later and nothing else.

    Models give one with every chunk that is not their first. Looked at only where it is numbers.
    """
    if type(mask) is not Tensor:  # a fake one, while a graph is traced
        return False
    shown = allowed(mask)
    if mask.dtype != torch.bool and bool(mask.masked_fill(~shown, 0.0).any()):
        return False
    causal = torch.ones(shown.shape[-2:], dtype=torch.bool, device=mask.device)
    causal = causal.tril(shown.shape[-1] - shown.shape[-2])
    return torch.equal(shown, causal.expand_as(shown))


def attend_in_halves(
    q: Tensor, pair: Sequence[Tensor], pos: Tensor, plan: LayerPlan, knobs: Knobs
) -> Tensor:
    """Output [B, Hkv, G, T, Dx] of T queries [B, Hq, T, Dx], the last T columns' own.

    Args:
        pair: keys and values [B, Hx, N, Dx], slots first.
        pos: [B, Hkv, C] positions of the slots, -1 where they are empty.
    """
    (batch, heads), groups = pair[0].shape[:2], q.shape[1] // pair[0].shape[1]
    queries = group(q, heads).flatten(0, 1)
    slots = pos.shape[-1]
    keys, values = (x.to(q.dtype).flatten(0, 1)[:, None].expand(-1, groups, -1, -1) for x in pair)
    shown = (pos >= 0).repeat_interleave(heads // plan.heads, 1).flatten(0, 1)[:, None, None]
    hidden = torch.zeros_like(shown, dtype=q.dtype).masked_fill(~shown, float("-inf"))
    old, old_sum = FUSED(
        queries, keys[:, :, :slots], values[:, :, :slots], attn_mask=hidden, scale=knobs.scale
    )
    own, own_sum = FUSED(
        queries, keys[:, :, slots:], values[:, :, slots:], is_causal=True, scale=knobs.scale
    )
    # Of no slot at all there is no sum.
    difference = torch.where(shown.any(-1), old_sum - own_sum, float("-inf"))[..., None]
    share = torch.sigmoid(difference)
    old = torch.where(share == 0, 0.0, old.float())
    out = old * share + own.float() * (1 - share)
    return group(out.to(q.dtype).unflatten(0, (batch, heads)).flatten(1, 2), plan.heads)
