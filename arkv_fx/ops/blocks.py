"""Attention of many new tokens, a block of queries at a time: memory grows with the tokens alone.

Written out, the logits of T queries over N columns take T x N numbers for each head; here only a
block of queries has its own written out, or, where fused attention can express it, its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from arkv_fx.formats import get_format
from arkv_fx.kernels.softmax import (
    Knobs,
    cap,
    group,
    hide_new,
    hide_slots,
    key_logits,
    softmax,
    value_sum,
)
from arkv_fx.plan import LayerPlan

LOGITS = 2**22
"""Logits that a call may write out at once, in numbers; a block is no smaller than ``LEAST``."""
LEAST = 64


def columns_logits(q: Tensor, keys: Tensor, plan: LayerPlan, knobs: Knobs) -> Tensor:
    """Unmasked logits [B, Hkv, G, T, N], float32; ``keys`` [B, Hx, N, Dx] may have more heads."""
    native = get_format("native")
    scaled = group(q.detach().float() * knobs.scale, keys.shape[1])
    logits = key_logits(scaled, native.key, [keys.detach()], keys.shape[-1])
    return cap(group(logits.flatten(1, 2), plan.heads), knobs)


def columns_sum(probs: Tensor, values: Tensor, plan: LayerPlan) -> Tensor:
    """Output [B, Hkv, G, T, Dx] from probabilities [B, Hkv, G, T, N]."""
    split = group(probs.flatten(1, 2), values.shape[1])
    out = value_sum(split, get_format("native").value, [values], values.shape[-1])
    return group(out.flatten(1, 2), plan.heads)


def hide_columns(
    logits: Tensor, pos: Tensor | None, query_pos: Tensor, mask: Tensor | None, offset: Tensor,
    plan: LayerPlan, newest: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mask logits [B, Hkv, G, Q, N] of slots at ``pos`` [B, Hkv, C], if any, then of new tokens.

    Args:
        query_pos: [B, Q] int.
        newest: [B, 1] int, position of the last column; None: that of the last query.
        mask: None, or [B or 1, Hq or 1, Q, S] whose last column is the newest token.
        offset: [B] int, position of the mask's first column.
    """
    if pos is None:
        return hide_new(logits, mask, plan, query_pos, newest)
    old, own = logits.split([pos.shape[-1], logits.shape[-1] - pos.shape[-1]], -1)
    old = hide_slots(old, pos, query_pos, mask, offset, plan.sliding)
    return torch.cat([old, hide_new(own, mask, plan, query_pos, newest)], -1)


def fits(rows: int, columns: int, batch: int, heads: int) -> bool:
    """Whether so many queries' logits may be written out at once; symbolic sizes always are."""
    sizes = (rows, columns, batch, heads)
    if any(isinstance(size, torch.SymInt) for size in sizes):  # a loop would be of this length only
        return True
    return rows <= LEAST or rows * columns * batch * heads <= LOGITS


def attend_in_blocks(
    q: Tensor, pair: Sequence[Tensor], pos: Tensor | None, mask: Tensor | None, offset: Tensor,
    query_pos: Tensor, plan: LayerPlan, knobs: Knobs,
) -> Tensor:  # fmt: skip
    """Output [B, Hkv, G, T, Dx] over the columns ``pair``: slots, then new tokens.

    Args:
        q: [B, Hq, T, Dx]; query_pos: [B, T] int, the last that of the newest token.
        pair: keys and values [B, Hx, N, Dx].
        pos: [B, Hkv, C] positions of the slots; None: there are none.
        mask, offset: see ``hide_columns``.
    """
    pair = [x.to(q.dtype) for x in pair]
    by_head = mask is not None and mask.shape[1] > 1
    attend = (
        _written if knobs.softcap or knobs.sink_logits is not None else partial(_fused, by_head)
    )
    outs = []
    for rows, later in _blocks(q, pair[0].shape[2], mask):
        keys, values = (x[:, :, : x.shape[2] - later] for x in pair)
        newest = query_pos[:, query_pos.shape[1] - 1 - later, None]
        here = partial(
            hide_columns, pos=pos, query_pos=query_pos[:, rows], newest=newest, offset=offset,
            mask=None if mask is None else mask[..., rows, :], plan=plan,
        )  # fmt: skip
        outs.append(attend(q[:, :, rows], keys, values, here, plan, knobs))
    return torch.cat(outs, 3)


def _blocks(q: Tensor, columns: int, mask: Tensor | None) -> Iterator[tuple[slice, int]]:
    """Queries of each block, and how many of the last columns none of them sees."""
    batch, heads, length = q.shape[:3]
    size = max(LEAST, LOGITS // (batch * heads * columns))
    for start in range(0, length, size):
        stop = min(start + size, length)
        # By a mask queries may see what comes after them.
        yield slice(start, stop), 0 if mask is not None else length - stop


def _written(
    q: Tensor, keys: Tensor, values: Tensor, hide: Callable[[Tensor], Tensor], plan: LayerPlan,
    knobs: Knobs,
) -> Tensor:  # fmt: skip
    """What fused attention knows nothing of: soft-capped logits, and sinks."""
    probs = softmax(hide(columns_logits(q, keys, plan, knobs)), knobs.sink_logits)
    return columns_sum(probs, values, plan).to(q.dtype)


def _fused(
    by_head: bool, q: Tensor, keys: Tensor, values: Tensor, hide: Callable[[Tensor], Tensor],
    plan: LayerPlan, knobs: Knobs,
) -> Tensor:  # fmt: skip
    """Fused attention under an additive mask, of each query head its own or of each kv head."""
    (batch, heads), groups = keys.shape[:2], q.shape[1] // keys.shape[1]
    zeros = q.new_zeros((), dtype=torch.float32)
    apart = q.shape[1] // plan.heads if by_head else 1
    bias = hide(zeros.expand(batch, plan.heads, apart, q.shape[2], keys.shape[2]))
    seen = (bias > float("-inf")).any(-1, keepdim=True)
    if by_head:
        bias, seen = (group(x.flatten(1, 2), heads) for x in (bias, seen))
    else:
        bias, seen = (x.repeat_interleave(heads // plan.heads, 1) for x in (bias, seen))
    k, v = (x.flatten(0, 1)[:, None].expand(-1, groups, -1, -1) for x in (keys, values))
    out = scaled_dot_product_attention(
        group(q, heads).flatten(0, 1), k, v,
        attn_mask=bias.to(q.dtype).flatten(0, 1), scale=knobs.scale,
    )  # fmt: skip
    # A row with nothing to attend to is defined as zeros; fused kernels differ on it.
    out = out.masked_fill(~seen.flatten(0, 1), 0.0).unflatten(0, (batch, heads))
    return group(out.flatten(1, 2), plan.heads)
