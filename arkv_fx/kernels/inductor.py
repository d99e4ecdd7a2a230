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

from arkv_fx.formats.codec import Unpacked
from arkv_fx.kernels.columns import (
    centre_logits,
    column_bias,
    join_bases,
    lowest,
    stored_query,
)
from arkv_fx.kernels.kernel import Kernel
from arkv_fx.kernels.softmax import Knobs, cap, softmax
from arkv_fx.state.view import Segment, View


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: View, knobs: Knobs,
    query_pos: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``Attend``; one new token."""
    least = lowest(held, query_pos)[:, None, None, None]
    pos = held.positions.split([s.slots for s in held.segments], -1)
    parts = []
    for segment, own_pos in zip(held.segments, pos, strict=True):
        found = cap(_logits(q, segment) * knobs.scale, knobs)
        parts.append(found.masked_fill(own_pos[:, :, None] <= least, float("-inf")))
    own = (q.squeeze(3).float() * k.float()).sum(-1, keepdim=True)
    logits = torch.cat([*parts, cap(own * knobs.scale, knobs)], -1)
    bias = column_bias(mask, held, q.shape[2])
    if bias is not None:
        logits = logits + bias
    probs = softmax(logits[:, :, :, None], knobs.sink_logits)
    shares = written(probs.squeeze(3))
    outs = [_mix(shares[..., s.start : s.start + s.slots], s) for s in held.segments]
    return join_bases(outs, held, shares[..., -1:] * v.float()), probs


def _logits(q: Tensor, segment: Segment) -> Tensor:
    """q . k of all slots, before scale, float32 [B, Hkv, G, C]."""
    keys = segment.format.key.unpack_words(segment.k)
    rows = stored_query(q, segment)
    parts = written((keys.deal(rows) * _units(keys, rows)).contiguous())
    dots = []
    for g in range(rows.shape[2]):
        products = [parts[:, :, g, None, None, i] * x[:, :, None] for i, x in enumerate(keys.runs)]
        dots.append(functools.reduce(torch.add, products).sum(-1))
    logits = torch.cat(dots, 2)
    if keys.zero is not None:
        logits = logits - keys.zero.transpose(-1, -2) * rows.sum(-1, keepdim=True)
    if keys.scale is not None:
        logits = logits * keys.scale.transpose(-1, -2)
    common = centre_logits(q, segment)
    return logits if common is None else logits + common[..., None]


def _mix(shares: Tensor, segment: Segment) -> Tensor:
    """Sum of share times stored value, float32 [B, Hkv, G, Dv]; shares [B, Hkv, G, C]."""
    values = segment.format.value.unpack_words(segment.v)
    if values.scale is not None:
        shares = written(shares * values.scale.transpose(-1, -2))
    groups = shares.shape[2]
    # One list of sums, and nothing done to any of them: so they are written where `cat` wants them.
    sums = [
        (shares[:, :, g, None, :, None] * run[:, :, None]).sum(3)
        for g in range(groups)
        for run in values.runs
    ]
    mixed = torch.cat(sums, 2).unflatten(2, (groups, -1))
    mixed = values.gather(mixed * _units(values, mixed))
    if values.zero is None:
        return mixed
    return mixed - (shares * values.zero.transpose(-1, -2)).sum(-1, keepdim=True)


def _units(found: Unpacked, like: Tensor) -> Tensor:
    """The units of the runs, to be multiplied by numbers [..., runs, D / runs]."""
    return torch.tensor(found.units, device=like.device)[:, None]


def written(x: Tensor) -> Tensor:
    """``x``, made once: a restride keeps Inductor from computing it again in an inner loop."""
    return x.as_strided(x.size(), x.stride())


KERNEL = Kernel("inductor", attend_one, priority=10, for_inductor=True)
