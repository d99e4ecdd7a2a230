"""What every kernel takes from the torch side: queries in stored bases, and which slots hide.

All of it is of the size of the query or of the mask, never of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkv_fx.kernels.softmax import allowed, gather_mask
from arkv_fx.state.view import Segment, View


def stored_query(q: Tensor, segment: Segment) -> Tensor:
    """Queries [B, Hkv, G, 1, Dk] in the basis of the segment's keys, float32 [B, Hkv, G, Dk]."""
    return segment.format.key.to_stored(q.squeeze(3).float())


def centre_logits(q: Tensor, segment: Segment) -> Tensor | None:
    """What the keys' common part adds to every logit (before scale), float32 [B, Hkv, G]."""
    if segment.centre is None:
        return None
    return (q.squeeze(3).float() * segment.centre).sum(-1)


def lowest(held: View, query_pos: Tensor) -> Tensor:
    """[B] int32: slots at or below this position are not seen; empty slots have position -1."""
    if not held.plan.sliding:
        return torch.full_like(query_pos[:, 0], -1)
    return (query_pos[:, 0] - held.plan.sliding).clamp(min=-1)


def column_bias(mask: Tensor | None, held: View, groups: int) -> Tensor | None:
    """The mask by column (slots, then the new token), float32 [B, Hkv, G or 1, N], -inf hides.

    It is added after scale and soft-capping; ``lowest`` applies besides.
    """
    if mask is None:
        return None
    offset = held.seen + 1 - mask.shape[-1]
    own = held.seen[:, None, None].expand(-1, held.plan.heads, 1)
    found = gather_mask(mask, torch.cat([held.positions, own], -1), offset, groups).squeeze(3)
    added = 0.0 if found.dtype == torch.bool else found.float()
    return torch.where(allowed(found), added, float("-inf"))


def join_bases(outs: list[Tensor], held: View, own: Tensor) -> Tensor:
    """Output [B, Hkv, G, 1, Dv] from each segment's share in its own basis and the new token's.

    Args:
        outs: per segment, float32 [B, Hkv, G, Dv], sum of probability times stored value.
        own: the same of the new token, in the plain basis.
    """
    by_codec: dict[str, Tensor] = {}
    for segment, part in zip(held.segments, outs, strict=True):
        name = segment.format.value.name
        by_codec[name] = by_codec[name] + part if name in by_codec else part
    codecs = {s.format.value.name: s.format.value for s in held.segments}
    for name, part in by_codec.items():
        own = own + codecs[name].from_stored(part)
    return own[:, :, :, None]
