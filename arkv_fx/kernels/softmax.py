"""Softmax attention over slots and new tokens: the reference every kernel is tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arkv_fx.formats import Codec
from arkv_fx.plan import LayerPlan
from arkv_fx.state.view import Segment


@dataclass(frozen=True)
class Knobs:
    """Arguments of one attention site.

    ``scale`` multiplies the logits, ``softcap`` > 0 bounds them by tanh, ``sink_logits`` [Hq] is
    one extra logit per query head that takes probability and gives no value.
    """

    scale: float
    softcap: float = 0.0
    sink_logits: Tensor | None = None


def gather_mask(mask: Tensor, pos: Tensor, offset: Tensor, groups: int) -> Tensor:
    """Columns of a mask by slot position.

    Args:
        mask: [B or 1, Hq or 1, T, S], bool (True attends) or additive.
        pos: [B, Hkv, C] int, position of each slot.
        offset: [B] int, position of the mask's first column.
        groups: query heads per kv head.

    Returns:
        [B, Hkv, G or 1, T, C]; a position outside the mask takes an end column: such slots are
        empty or out of the sliding window, and the caller hides them.
    """
    batch, heads, slots = pos.shape
    length = mask.shape[-1]
    column = (pos - offset[:, None, None]).clamp(min=0).clamp(max=length - 1).long()
    per_head = groups if mask.shape[1] > 1 else 1
    if mask.shape[1] > 1:
        full: Tensor = mask.expand(batch, -1, -1, -1).unflatten(1, (heads, groups))
    else:
        full = mask[:, :, None].expand(batch, heads, 1, -1, -1)
    index = column[:, :, None, None, :].expand(-1, -1, per_head, mask.shape[-2], slots)
    return full.gather(-1, index)


def hide(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a bool or additive mask, broadcast to ``logits``."""
    if mask is None:
        return logits
    if mask.dtype != torch.bool:
        logits = logits + mask.float()
    return logits.masked_fill(~allowed(mask), float("-inf"))


def allowed(mask: Tensor) -> Tensor:
    """Bool form of a mask: an additive one hides below half of its dtype's lowest number."""
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def group(q: Tensor, heads: int) -> Tensor:
    """[B, Hq, T, D] -> [B, Hkv, G, T, D]."""
    grouped: Tensor = q.unflatten(1, (heads, q.shape[1] // heads))
    return grouped


def key_logits(
    q: Tensor, codec: Codec, fields: list[Tensor], dim: int, *, sums: bool = False
) -> Tensor:
    """q . k over the slots of one segment, float32 [B, Hkv, G, T, C].

    The query is turned into the codec's stored basis once instead of every key out of it. ``sums``
    spells the product out, for compilers that fuse sums with what makes their terms and would have
    the keys of a library's product written out.
    """
    batch, heads, groups, length, _ = q.shape
    keys = codec.decode(fields, dim, torch.float32)
    rows = codec.to_stored(q.float()).flatten(2, 3)
    if sums:
        logits = (rows[:, :, :, None] * keys[:, :, None]).sum(-1)
    else:
        logits = rows @ keys.transpose(-1, -2)
    return logits.view(batch, heads, groups, length, -1)


def value_sum(
    p: Tensor, codec: Codec, fields: list[Tensor], dim: int, *, sums: bool = False
) -> Tensor:
    """p . v over one segment, float32 [B, Hkv, G, T, Dv], turned back once at the end."""
    batch, heads, groups, length, _ = p.shape
    values = codec.decode(fields, dim, torch.float32)
    shares = p.flatten(2, 3)
    out = (shares[..., None] * values[:, :, None]).sum(-2) if sums else shares @ values
    return codec.from_stored(out.view(batch, heads, groups, length, dim))


def slot_logits(
    q: Tensor, segment: Segment, query_pos: Tensor, mask: Tensor | None, offset: Tensor,
    sliding: int, knobs: Knobs, *, sums: bool = False,
) -> Tensor:  # fmt: skip
    """Masked logits of the queries against one segment, float32 [B, Hkv, G, T, C].

    Args:
        q: [B, Hkv, G, T, Dk]; query_pos: [B, T] int; mask: [B, H, T, S] by position, or None.
    """
    logits = key_logits(q, segment.format.key, segment.k, q.shape[-1], sums=sums)
    if segment.centre is not None:
        logits = logits + q.float() @ segment.centre[:, :, None].transpose(-1, -2)
    logits = cap(logits * knobs.scale, knobs)
    return hide_slots(logits, segment.positions, query_pos, mask, offset, sliding)


def hide_slots(
    logits: Tensor, pos: Tensor, query_pos: Tensor, mask: Tensor | None, offset: Tensor,
    sliding: int,
) -> Tensor:  # fmt: skip
    """Mask the columns of slots [B, Hkv, G, T, C] by their positions ``pos`` [B, Hkv, C]."""
    column = pos[:, :, None, None, :]
    shown = column >= 0
    if sliding:
        shown = shown & (column > query_pos[:, None, None, :, None] - sliding)
    if mask is not None:
        logits = hide(logits, gather_mask(mask, pos, offset, logits.shape[2]))
    return logits.masked_fill(~shown, float("-inf"))


def hide_new(
    logits: Tensor, mask: Tensor | None, plan: LayerPlan, query_pos: Tensor,
    newest: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mask the new tokens' columns [B, Hkv, G, Q, T] for queries at ``query_pos`` [B, Q].

    Without a mask they are causal among themselves. ``newest`` [B, 1] is the position of the last
    column; None: that of the last query.
    """
    length = logits.shape[-1]
    last = query_pos[:, -1:] if newest is None else newest
    column_pos = (
        last[..., None] - (length - 1)
        + torch.arange(length, device=logits.device, dtype=torch.int32)
    )  # fmt: skip
    rows = query_pos[:, :, None]
    if mask is not None:
        own = mask[..., -length:]
        if own.shape[1] > 1:
            own = own.unflatten(1, (plan.heads, -1))
        else:
            own = own[:, :, None]
        logits = hide(logits, own)
    else:
        logits = hide(logits, (column_pos <= rows)[:, None, None])
    if plan.sliding:
        logits = hide(logits, (column_pos > rows - plan.sliding)[:, None, None])
    return logits


def cap(logits: Tensor, knobs: Knobs) -> Tensor:
    """Soft-capping of logits (Gemma 2): softcap * tanh(logits / softcap)."""
    if knobs.softcap:
        return torch.tanh(logits / knobs.softcap) * knobs.softcap
    return logits


def softmax(logits: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax over the last axis; a row with nothing to attend to gives zeros, not NaN.

    Args:
        logits: [B, Hkv, G, T, N] float32; sink_logits: [Hq] or None.
    """
    top = logits.amax(-1, keepdim=True)
    sink = None
    if sink_logits is not None:
        sink = sink_logits.float().view(1, logits.shape[1], logits.shape[2], 1, 1)
        top = torch.maximum(top, sink)
    top = torch.where(top == float("-inf"), 0.0, top)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    return weights / torch.where(total == 0, 1.0, total)


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool,
    scale: float, softcap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention with soft-capping and sinks, without a cache: what ``arkv::attention`` computes.

    Args:
        query: [B, Hq, T, Dk]; key: [B, Hkv, S, Dk]; value: [B, Hkv, S, Dv].
        attn_mask: [B or 1, Hq or 1, T, S], bool (True attends) or additive.
        is_causal: query i sees keys up to i + S - T.

    Returns:
        [B, Hq, T, Dv] in the query's dtype.
    """
    heads = key.shape[1]
    logits = group(query.float(), heads) @ key.float()[:, :, None].transpose(-1, -2)
    logits = cap(logits * scale, Knobs(scale, softcap))
    tokens, keys = logits.shape[-2:]
    if is_causal:
        seen = torch.ones(tokens, keys, dtype=torch.bool, device=query.device)
        logits = logits.masked_fill(~seen.tril(keys - tokens), float("-inf"))
    if attn_mask is not None:
        full = attn_mask if attn_mask.shape[1] == 1 else group(attn_mask, heads)
        logits = hide(logits, full[:, :, None] if full.dim() == 4 else full)
    out = softmax(logits, sinks) @ value.float()[:, :, None]
    return out.flatten(1, 2).to(query.dtype)
