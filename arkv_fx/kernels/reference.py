"""The reference: explicit softmax over ring, tiers and new tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv_fx.formats import Codec, get_format
from arkv_fx.kernels.kernel import Kernel
from arkv_fx.kernels.softmax import (
    Knobs,
    cap,
    hide_new,
    key_logits,
    slot_logits,
    softmax,
    value_sum,
)
from arkv_fx.state.view import View


def attend_columns(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: View, knobs: Knobs,
    query_pos: Tensor, *, sums: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``Attend``; T may be any number of new tokens. ``sums``: see ``key_logits``."""
    plan, length = held.plan, k.shape[2]
    offset = held.seen + length - (mask.shape[-1] if mask is not None else 0)
    logits = [
        slot_logits(q, s, query_pos, mask, offset, plan.sliding, knobs, sums=sums)
        for s in held.segments
    ]
    native = get_format("native")
    own = cap(key_logits(q, native.key, [k], plan.k_dim) * knobs.scale, knobs)
    logits.append(hide_new(own, mask, plan, query_pos))
    probs = softmax(torch.cat(logits, -1), knobs.sink_logits)
    shares = probs.split([s.slots for s in held.segments] + [length], -1)
    out = value_sum(shares[-1], native.value, [v], plan.v_dim)
    for segment, share in zip(held.segments, shares[:-1], strict=True):
        out = out + value_sum(share, segment.format.value, segment.v, plan.v_dim, sums=sums)
    return out, probs


def encode_rows(
    codec: Codec, x: Tensor, source: Tensor, centre: Tensor | None, fields: list[Tensor]
) -> None:
    """See ``Encoder``."""
    x = gather(x, source.clamp(min=0))
    if centre is not None:
        x = x.float() - centre
    for field, code in zip(fields, codec.encode(x), strict=True):
        field.copy_(torch.where(source[..., None] >= 0, code.to(field.dtype), field))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Slots ``index`` [B, Hkv, M] of x [B, Hkv, N] or [B, Hkv, N, D]."""
    if x.dim() == 3:
        return x.gather(2, index)
    # Whole rows at once: a gather looks up every number on its own.
    batch, heads, slots, width = x.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * slots
    rows = x.reshape(-1, width).index_select(0, (first + index).flatten())
    return rows.view(batch, heads, -1, width)


KERNEL = Kernel("reference", attend_columns, priority=0)
