"""The form that Inductor turns into loops over the codes themselves.

A matrix product would be a call to a library, which wants its operands written out: keys and
values in full precision. Products and sums are fused with whatever makes their operands, so here
codes become numbers inside the reduction, once for all query heads of a kv head, and no tensor of
the size of a tier's keys or values is ever made. Run eagerly it would make many: compile it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from arkv_fx.ops.attention import Knobs, cap, softmax
from arkv_fx.ops.kernels.columns import (
    centre_logits,
    column_bias,
    join_bases,
    lowest,
    stored_query,
)
from arkv_fx.state.view import Segment, View


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: View, knobs: Knobs,
    query_pos: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``Kernel``; one new token."""
    parts = [_logits(q, segment) for segment in held.segments]
    own = (q.squeeze(3).float() * k.float()).sum(-1)
    logits = cap(torch.cat([*parts, own[..., None]], -1) * knobs.scale, knobs)
    bias = column_bias(mask, held, q.shape[2])
    if bias is not None:
        logits = logits + bias
    seen = held.pos > lowest(held, query_pos)[:, None, None]
    seen = torch.nn.functional.pad(seen, (0, 1), value=True)  # the new token itself
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    probs = softmax(logits[:, :, :, None], knobs.sink_logits)
    shares = written(probs.squeeze(3))
    outs = [_mix(shares[..., s.start : s.start + s.slots], s) for s in held.segments]
    return join_bases(outs, held, shares[..., -1:] * v.float()), probs


def _logits(q: Tensor, segment: Segment) -> Tensor:
    """q . k of all slots, before scale, float32 [B, Hkv, G, C]."""
    keys = segment.format.key.unpack(segment.k)
    rows = stored_query(q, segment)
    chunks = rows.chunk(len(keys.runs), -1)
    parts = [written(part * unit) for part, unit in zip(chunks, keys.units, strict=True)]
    common = centre_logits(q, segment)
    out = []
    for g in range(rows.shape[2]):
        products = [x[:, :, g, None] * run for x, run in zip(parts, keys.runs, strict=True)]
        dot = functools.reduce(torch.add, products).sum(-1)
        if keys.zero is not None:
            dot = dot - keys.zero.squeeze(-1) * rows[:, :, g].sum(-1, keepdim=True)
        if keys.scale is not None:
            dot = dot * keys.scale.squeeze(-1)
        if common is not None:
            dot = dot + common[:, :, g, None]
        out.append(dot)
    return torch.stack(out, 2)


def _mix(shares: Tensor, segment: Segment) -> Tensor:
    """Sum of share times stored value, float32 [B, Hkv, G, Dv]; shares [B, Hkv, G, C]."""
    values = segment.format.value.unpack(segment.v)
    if values.scale is not None:
        shares = written(shares * values.scale.squeeze(-1)[:, :, None])
    out = []
    for g in range(shares.shape[2]):
        weight = shares[:, :, g, :, None]
        sums = [
            (weight * run).sum(2) * unit
            for run, unit in zip(values.runs, values.units, strict=True)
        ]
        mixed = torch.cat(sums, -1)
        if values.zero is not None:
            mixed = mixed - (weight * values.zero).sum(2)
        out.append(mixed)
    return torch.stack(out, 2)


def written(x: Tensor) -> Tensor:
    """``x``, made once: a restride keeps Inductor from computing it again in an inner loop."""
    return x.as_strided(x.size(), x.stride())
