"""Tier moves: what enters the ring, what leaves it, what is demoted and what is evicted.

Both forms keep, in every tier, the best ranked of the tokens it holds and the tokens that come
down to it; the losers come down to the next tier, and those of the last tier are gone.
``exchange_one`` does it in place for one token, ``merge_many`` by sorting for many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arkv_fx.ops.codes import best
from arkv_fx.ops.kernels import ENCODERS, WRITERS, Encoder, Writer
from arkv_fx.ops.kernels.reference import encode_rows, gather
from arkv_fx.ops.scores import Stats
from arkv_fx.state.view import Segment, View


@dataclass
class Arrivals:
    """Tokens in native precision on their way into the state.

    ``k`` [B, Hkv, T, Dk], ``v`` [B, Hkv, T, Dv], ``pos`` [B, Hkv, N] int32 with -1 for "no
    token", ``valid`` [B, N] bool, ``stats`` [B, Hkv, N] each. ``rows`` [B, Hkv, N] int64 tells
    where in k and v each of the N tokens lies, None where N is T and they lie in order: tokens
    are sorted several times, and only those that are stored in the end are worth copying.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    valid: Tensor
    stats: Stats
    rows: Tensor | None = None

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """[B, Hkv, N, Dk] and [B, Hkv, N, Dv]."""
        if self.rows is None:
            return self.k, self.v
        return gather(self.k, self.rows), gather(self.v, self.rows)


@dataclass
class Move:
    """One slot [B, Hkv] of a segment and where [B, Hkv] the token on its way takes it.

    Where it does, the slot's holder is on its way from then on.
    """

    segment: Segment
    slot: Tensor
    wins: Tensor


def exchange_one(held: View, new: Arrivals, updated: Stats, kernel: str = "reference") -> None:
    """The decode step: the new token takes its ring slot, the token there goes down the tiers.

    Args:
        updated: statistics of all columns [B, Hkv, N] (ring, tiers, new token) after the step.
        kernel: whose writer stores the tokens, see ``arkv_fx.ops.kernels.WRITERS``.
    """
    moves = _choose_moves(held, new, updated)
    _move_tokens(held, new.k, new.v, moves, WRITERS.get(kernel))


def _choose_moves(held: View, new: Arrivals, updated: Stats) -> list[Move]:
    """Where the tokens go, judged by positions and statistics alone, which are written here."""
    plan = held.plan
    count = held.count.long()
    slot = torch.where(
        count < plan.sinks, count, plan.sinks + (count - plan.sinks).remainder(plan.window)
    )[:, None].expand(-1, plan.heads)
    wins = new.valid[:, :1].expand(-1, plan.heads)
    pos, stats = new.pos, {n: t[..., -1:] for n, t in updated.items()}
    whole = {"pos": held.pos, **{n: t[..., : plan.slots] for n, t in updated.items()}}
    index = torch.arange(plan.slots, device=held.pos.device, dtype=torch.int32)
    moves: list[Move] = []
    tiers = [t for t in held.tiers if t.slots]
    for segment in (held.ring, *tiers):
        if moves:
            last = segment is tiers[-1]
            here = slice(segment.start, segment.start + segment.slots)
            columns = {n: torch.cat([t[..., here], stats[n]], -1) for n, t in updated.items()}
            candidates = torch.cat([segment.pos, pos], -1)
            weakest = _weakest(_rank(held, candidates, columns, held.seen, last))
            wins = weakest < segment.slots  # else the token on its way is the weakest itself
            slot = weakest.clamp(max=segment.slots - 1)
        moves.append(Move(segment, slot, wins))
        column = (segment.start + slot)[..., None]
        chosen = index == torch.where(wins[..., None], column, -1).int()  # int64 vectorises badly
        came = {"pos": pos, **stats}
        old = {"pos": held.pos, **updated}
        # Of the ring, the holder leaves even where an invalid token takes nothing: as no token.
        gone = {n: t.gather(-1, column) for n, t in old.items()}
        whole = {n: torch.where(chosen, came[n].to(t.dtype), t) for n, t in whole.items()}
        if len(moves) == 1:
            pos = torch.where(wins[..., None], gone.pop("pos"), -1)
            stats = gone
        else:
            pos = torch.where(wins[..., None], gone.pop("pos"), pos)
            stats = {n: torch.where(wins[..., None], t, stats[n]) for n, t in gone.items()}
    held.pos.copy_(whole.pop("pos"))
    for name, stat in held.stats.items():
        stat.copy_(whole[name])
    return moves


def _move_tokens(
    held: View, k: Tensor, v: Tensor, moves: list[Move], writer: Writer | None
) -> None:
    """Write new keys and values [B, Hkv, 1, D] and what they displace, every tensor once."""
    dims = (held.plan.k_dim, held.plan.v_dim)
    for step, move in enumerate(moves):
        at = _at(move.slot)
        leaving = None
        if step + 1 < len(moves):
            leaving = (
                _read(move, writer, dims) if writer else move.segment.keys_and_values(at, dims)
            )
        if writer is not None:
            _write(move, k, v, writer.store)
        else:
            old = [f[at] for _, fields in move.segment.parts() for f in fields]
            for (field, code), was in zip(_codes(move.segment, k, v), old, strict=True):
                # A restride makes Inductor write the old codes out, small as they are: read where
                # the new ones are made, they do not compile with torch 2.11 (an index is used in
                # the transposed loop before its definition).
                was = was.as_strided(was.size(), was.stride())
                field.index_put_(at, torch.where(move.wins[..., None], code.squeeze(2), was))
        if leaving is not None:
            wins = move.wins[:, :, None, None]
            # What leaves the ring is no token unless it was displaced, so nothing looks at it.
            k = torch.where(wins, leaving[0].reshape(k.shape), k.float())
            v = torch.where(wins, leaving[1].reshape(v.shape), v.float())


def _read(move: Move, writer: Writer, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The holders [B, Hkv, 1, D] of a move's slots, as numbers."""
    k, v = (
        [writer.take(field, move.slot) for field in fields] for _, fields in move.segment.parts()
    )
    return replace(move.segment, k=k, v=v).keys_and_values(..., dims)


def _write(move: Move, k: Tensor, v: Tensor, writer: Encoder) -> None:
    """One token [B, Hkv, 1, D] into its slot, if it takes one."""
    segment = move.segment
    index = torch.arange(segment.slots, device=k.device)
    rows = torch.where((index == move.slot[..., None]) & move.wins[..., None], 0, -1)
    for (codec, fields), x, centre in zip(
        segment.parts(), (k, v), (segment.centre, None), strict=True
    ):
        writer(codec, x, rows, centre, fields)


def _weakest(rank: Tensor) -> Tensor:
    """[B, Hkv] int64 index of the smallest rank [B, Hkv, N].

    Of equals the last one loses, as in merge_many's stable sort: the arrival, if it is among them.
    """
    index = torch.arange(rank.shape[-1], device=rank.device, dtype=torch.int32)
    least = rank.amin(-1, keepdim=True)
    return torch.where(rank == least, index, -1).amax(-1).long()


def merge_many(
    held: View, new: Arrivals, updated: Stats, fresh: bool, kernel: str = "reference"
) -> None:
    """A chunk: ring and sinks take their tokens, all others are sorted into the tiers.

    Tokens that stay in a tier are copied as codes, never encoded again.

    Args:
        updated: statistics [B, Hkv, N] after the chunk, of ring, tiers and new tokens, or of the
            new tokens alone if ``fresh``.
        kernel: whose encoder makes the codes, see ``arkv_fx.ops.kernels.ENCODERS``.
    """
    plan, ring = held.plan, held.ring
    encoder = ENCODERS.get(kernel, encode_rows)
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
    out = Arrivals(new.k, new.v, torch.where(stays_out, new.pos, -1), new.valid, new.stats)
    if not fresh:
        out = _join(_leavers(ring, is_new), out)
    _store(ring, new, torch.where(is_new[:, None], source, -1), encoder)
    now = held.seen + length - 1
    tiers = [t for t in held.tiers if t.slots]
    for tier in tiers:
        last = tier is tiers[-1]
        pos = torch.cat([tier.pos, out.pos], -1)
        stats = {n: torch.cat([t, out.stats[n]], -1) for n, t in tier.stats.items()}
        rank = _rank(held, pos, stats, now, last)
        below = None
        if fresh:  # there is nothing in the tier that could come down
            winners = best(rank, tier.slots)
            won = _is_best(rank, winners)[..., tier.slots :]
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


def _is_best(rank: Tensor, winners: Tensor) -> Tensor:
    """Which of ``rank`` [B, Hkv, N] are among ``best(rank, ..)`` [B, Hkv, M]."""
    last = winners[..., -1:]
    least = rank.gather(-1, last)
    index = torch.arange(rank.shape[-1], device=rank.device)
    return (rank > least) | ((rank == least) & (index <= last))


def _rank(held: View, pos: Tensor, stats: Stats, now: Tensor, last: bool) -> Tensor:
    """Ranks [B, Hkv, N] of a tier's tokens and of those that come to it; -inf for no token."""
    policy = held.plan.policy()
    valid = pos >= 0
    if held.plan.sliding:  # the next query cannot see it: it is free to go
        valid = valid & (pos > now[:, None, None] + 1 - held.plan.sliding)
    age = (now[:, None, None] - pos).clamp(min=0).float()
    rank = (policy.eviction if last else policy.precision)(stats, age, valid)
    return torch.where(valid, rank, float("-inf"))


def _store_stats(held: View, updated: Stats) -> None:
    """Write the statistics of all slots back in place."""
    for name, stat in held.stats.items():
        stat.copy_(updated[name][..., : held.plan.slots])


def _at(slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index triple for one slot per sequence and head; ``slot`` [B, Hkv] int64."""
    batch, heads = slot.shape
    b = torch.arange(batch, device=slot.device)[:, None]
    h = torch.arange(heads, device=slot.device)[None]
    return b, h, slot


def _codes(segment: Segment, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each of a segment's storage tensors with what keys and values, encoded, write into it."""
    if segment.centre is not None:
        k = k.float() - segment.centre
    pairs: list[tuple[Tensor, Tensor]] = []
    for (codec, fields), x in zip(segment.parts(), (k, v), strict=True):
        codes = codec.encode(x)
        pairs += [(f, c.to(f.dtype)) for f, c in zip(fields, codes, strict=True)]
    return pairs


def _store(segment: Segment, tokens: Arrivals, rows: Tensor, encoder: Encoder) -> None:
    """Write into each slot the token ``rows`` [B, Hkv, C] int64; where that is -1, none."""
    token = _pick(tokens, rows.clamp(min=0))
    assert token.rows is not None
    taken = rows >= 0
    where = torch.where(taken, token.rows, -1)
    parts = zip(segment.parts(), (token.k, token.v), (segment.centre, None), strict=True)
    for (codec, fields), x, centre in parts:
        encoder(codec, x, where, centre, fields)
    stats = [(t, token.stats[n]) for n, t in segment.stats.items()]
    for field, value in [(segment.pos, token.pos), *stats]:
        field.copy_(torch.where(taken, value.to(field.dtype), field))


def _leavers(ring: Segment, replaced: Tensor) -> Arrivals:
    """The ring's tokens whose slots are taken; ``replaced`` [B, R] bool."""
    pos = torch.where(replaced[:, None], ring.pos, -1)
    stats = {n: t.clone() for n, t in ring.stats.items()}
    return Arrivals(ring.k[0].clone(), ring.v[0].clone(), pos, replaced, stats)


def _decode(segment: Segment, k_dim: int, v_dim: int) -> Arrivals:
    """All of a tier's tokens in plain numbers."""
    k, v = segment.keys_and_values(..., (k_dim, v_dim))
    return Arrivals(k, v, segment.pos, segment.pos[:, 0] >= 0, segment.stats)


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
        index if tokens.rows is None else tokens.rows.gather(-1, index),
    )
