"""Tier moves of a prompt or a chunk: many tokens come, and are sorted into the tiers.

Every tier keeps the best ranked of the tokens it holds and those that come down to it; the losers
come down to the next tier, and those of the last tier are gone. ``exchange.exchange_one`` does the
same for one token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arkv_fx.kernels import KERNELS, Encoder
from arkv_fx.kernels.reference import encode_rows, gather
from arkv_fx.ops.arrivals import Arrivals, rank_tokens
from arkv_fx.runtime.operators import best, is_best
from arkv_fx.scores import Stats
from arkv_fx.state.view import Segment, View, write_positions


def merge_many(
    held: View, new: Arrivals, updated: Stats, fresh: bool, kernel: str = "reference",
    encoder: Encoder | None = None,
) -> None:  # fmt: skip
    """A chunk: ring and sinks take their tokens, all others are sorted into the tiers.

    Tokens that stay in a tier are copied as codes, never encoded again.

    Args:
        updated: statistics [B, Hkv, N] after the chunk, of ring, tiers and new tokens, or of the
            new tokens alone if ``fresh``.
        kernel: whose encoder makes the codes, see ``arkv_fx.kernels.Kernel``; or ``encoder``.
    """
    plan, ring = held.plan, held.ring
    encoder = encoder or KERNELS.find(kernel).encode or encode_rows
    if not fresh:
        _store_stats(held, updated)
    length = new.k.shape[2]
    new = Arrivals(
        new.k, new.v, new.pos, new.valid, {n: t[..., -length:] for n, t in updated.items()}
    )
    order = new.valid.long().cumsum(-1)  # 1-based index of each real token in the chunk
    before = held.count.long()[:, None]
    after = before + order[:, -1:]
    # Which token (index among the row's real tokens) ends up in each ring slot.
    slots = torch.arange(plan.ring, device=order.device)
    target = torch.where(
        slots < plan.sinks, slots, after - 1 - (after - 1 - slots).remainder(plan.window)
    )
    is_new = (target >= before) & (target < after) & ((slots < plan.sinks) | (target >= plan.sinks))
    source = torch.searchsorted(order, (target - before + 1).contiguous())
    source = source.clamp(max=length - 1)[:, None].expand(-1, plan.heads, -1)
    index = order - 1 + before
    in_ring = (index < plan.sinks) | (index >= torch.clamp(after - plan.window, min=plan.sinks))
    stays_out = (new.valid & ~in_ring)[:, None]
    at_ring, at_new = _as_they_leave(held, new, fresh)
    out = Arrivals(new.k, new.v, torch.where(stays_out, new.pos, -1), new.valid, at_new)
    if not fresh:
        out = _join(_leavers(ring, is_new, at_ring), out)
    _store(ring, new, torch.where(is_new[:, None], source, -1), encoder)
    now = held.seen + length - 1
    tiers = [t for t in held.tiers if t.slots]
    for tier in tiers:
        last = tier is tiers[-1]
        pos = torch.cat([tier.positions, out.pos], -1)
        stats = {n: torch.cat([t, out.stats[n]], -1) for n, t in tier.stats.items()}
        rank = rank_tokens(held, pos, stats, now, last)
        below = None
        if fresh:  # there is nothing in the tier that could come down
            winners = best(rank, tier.slots)
            index = torch.arange(rank.shape[-1], device=rank.device)
            won = is_best(rank, winners, index)[..., tier.slots :]
            below = replace(out, pos=torch.where(won, -1, out.pos))
        else:
            order = rank.argsort(dim=-1, descending=True, stable=True)
            winners, losers = order[..., : tier.slots], order[..., tier.slots :]
            if not last:
                below = _pick(_join(_decode(tier, plan.k_dim, plan.v_dim), out), losers)
            kept = winners.clamp(max=tier.slots - 1)
            for field in (*tier.k, *tier.v, tier.pos, *tier.stats.values()):
                field.copy_(gather(field, kept))
        _store(tier, out, (winners - tier.slots).clamp(min=-1), encoder)
        if below is not None:
            out = below


def _store_stats(held: View, updated: Stats) -> None:
    """Write the statistics of all slots back in place."""
    for name, stat in held.stats.items():
        stat.copy_(updated[name][..., : held.plan.slots])


def _store(segment: Segment, tokens: Arrivals, source: Tensor, encoder: Encoder) -> None:
    """Write into each slot the token ``source`` [B, Hkv, C] int64; where that is -1, none."""
    token = _pick(tokens, source.clamp(min=0))
    assert token.places is not None
    taken = source >= 0
    where = torch.where(taken, token.places, -1)
    parts = zip(segment.parts(), (token.k, token.v), (segment.centre, None), strict=True)
    for (codec, fields), x, centre in parts:
        encoder(codec, x, where, centre, fields)
    write_positions(segment.pos, torch.where(taken, token.pos, segment.positions))
    for name, field in segment.stats.items():
        field.copy_(torch.where(taken, token.stats[name].to(field.dtype), field))


def _as_they_leave(held: View, new: Arrivals, fresh: bool) -> tuple[Stats, Stats]:
    """Statistics of the ring's tokens [B, Hkv, R] and the new ones, were they to leave the ring."""
    ring, policy, ahead = held.ring, held.plan.policy(), held.plan.ahead
    if not ahead:
        return ring.stats, new.stats
    if fresh:
        return ring.stats, policy.leave(new.stats, new.valid[:, None], ahead)
    order = ring.positions.argsort(dim=-1, stable=True)
    stats = {n: torch.cat([t.gather(-1, order), new.stats[n].to(t.dtype)], -1)
             for n, t in ring.stats.items()}  # fmt: skip
    pos = torch.cat([ring.positions.gather(-1, order), new.pos], -1)
    stats = policy.leave(stats, pos >= 0, ahead)
    back = order.argsort(dim=-1)
    slots = held.plan.ring
    return (
        {n: t[..., :slots].gather(-1, back) for n, t in stats.items()},
        {n: t[..., slots:] for n, t in stats.items()},
    )


def _leavers(ring: Segment, replaced: Tensor, stats: Stats) -> Arrivals:
    """The ring's tokens whose slots are taken; ``replaced`` [B, R] bool."""
    pos = torch.where(replaced[:, None], ring.positions, -1)
    stats = {n: t.clone() for n, t in stats.items()}
    return Arrivals(ring.k[0].clone(), ring.v[0].clone(), pos, replaced, stats)


def _decode(segment: Segment, k_dim: int, v_dim: int) -> Arrivals:
    """All of a tier's tokens in plain numbers."""
    k, v = segment.keys_and_values(..., (k_dim, v_dim))
    pos = segment.positions
    return Arrivals(k, v, pos, pos[:, 0] >= 0, segment.stats)


def _join(a: Arrivals, b: Arrivals) -> Arrivals:
    """Both groups of tokens, a's first."""
    k, v = (
        torch.cat([x.float(), y.float()], 2)  # a bf16 ring must not round the new tokens
        for x, y in zip(a.keys_and_values(), b.keys_and_values(), strict=True)
    )
    return Arrivals(
        k,
        v,
        torch.cat([a.pos, b.pos], -1),
        torch.cat([a.valid, b.valid], -1),
        {n: torch.cat([a.stats[n], b.stats[n].to(a.stats[n].dtype)], -1) for n in a.stats},
    )


def _pick(tokens: Arrivals, index: Tensor) -> Arrivals:
    """The tokens ``index`` [B, Hkv, M] of each head."""
    pos = gather(tokens.pos, index)
    return Arrivals(
        tokens.k,
        tokens.v,
        pos,
        pos[:, 0] >= 0,
        {n: gather(t, index) for n, t in tokens.stats.items()},
        index if tokens.places is None else tokens.places.gather(-1, index),
    )
