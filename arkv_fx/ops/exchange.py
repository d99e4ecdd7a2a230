"""Tier moves of a decode step: one token comes, one goes down each tier, in place.

Every tier keeps the best ranked of the tokens it holds and the one that comes down to it; the loser
comes down to the next tier, and that of the last tier is gone. ``merge.merge_many`` does the same
for many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arkv_fx.kernels import KERNELS, Encoder, Writer
from arkv_fx.ops.arrivals import Arrivals, rank_tokens
from arkv_fx.scores import Stats
from arkv_fx.state.view import Segment, View, write_positions


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
        kernel: whose writer stores the tokens, see ``arkv_fx.kernels.Kernel``.
    """
    moves = _choose_moves(held, new, updated)
    _move_tokens(held, new.k, new.v, moves, KERNELS.find(kernel).writer)


def _choose_moves(held: View, new: Arrivals, updated: Stats) -> list[Move]:
    """Where the tokens go, judged by positions and statistics alone, which are written here."""
    plan = held.plan
    count = held.count.long()
    slot = torch.where(
        count < plan.sinks, count, plan.sinks + (count - plan.sinks).remainder(plan.window)
    )[:, None].expand(-1, plan.heads)
    wins = new.valid[:, :1].expand(-1, plan.heads)
    pos, stats = new.pos, {n: t[..., -1:] for n, t in updated.items()}
    before = held.positions
    whole = {"pos": before, **{n: t[..., : plan.slots] for n, t in updated.items()}}
    index = torch.arange(plan.slots, device=held.pos.device, dtype=torch.int32)
    moves: list[Move] = []
    tiers = [t for t in held.tiers if t.slots]
    for segment in (held.ring, *tiers):
        if moves:
            last = segment is tiers[-1]
            here = slice(segment.start, segment.start + segment.slots)
            columns = {n: torch.cat([t[..., here], stats[n]], -1) for n, t in updated.items()}
            candidates = torch.cat([before[..., here], pos], -1)
            weakest = _weakest(rank_tokens(held, candidates, columns, held.seen, last))
            wins = weakest < segment.slots  # else the token on its way is the weakest itself
            # Also from below: compiled for CUDA, rows beyond the last find nothing at all, and
            # Inductor checks their index too.
            slot = weakest.clamp(0, segment.slots - 1)
        moves.append(Move(segment, slot, wins))
        column = (segment.start + slot)[..., None]
        chosen = index == torch.where(wins[..., None], column, -1).int()  # int64 vectorises badly
        came = {"pos": pos, **stats}
        old = {"pos": before, **updated}
        # Of the ring, the holder leaves even where an invalid token takes nothing: as no token.
        gone = {n: t.gather(-1, column) for n, t in old.items()}
        whole = {n: torch.where(chosen, came[n].to(t.dtype), t) for n, t in whole.items()}
        if len(moves) == 1:
            pos = torch.where(wins[..., None], gone.pop("pos"), -1)
            stats = _as_it_leaves(held, updated, slot) or gone
        else:
            pos = torch.where(wins[..., None], gone.pop("pos"), pos)
            stats = {n: torch.where(wins[..., None], t, stats[n]) for n, t in gone.items()}
    write_positions(held.pos, whole.pop("pos"))
    for name, stat in held.stats.items():
        stat.copy_(whole[name])
    return moves


def _as_it_leaves(held: View, updated: Stats, slot: Tensor) -> Stats | None:
    """Statistics of the token that leaves the ring's ``slot``, given those behind it there."""
    plan = held.plan
    if not plan.ahead:
        return None
    place = (slot - plan.sinks)[..., None] + torch.arange(plan.ahead + 1, device=slot.device)
    column = plan.sinks + place.remainder(plan.window)
    behind = {name: t.gather(-1, column) for name, t in updated.items()}
    found = plan.policy().leave(behind, torch.ones_like(column).bool(), plan.ahead)
    return {name: t[..., :1] for name, t in found.items()}


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
    source = torch.where((index == move.slot[..., None]) & move.wins[..., None], 0, -1)
    for (codec, fields), x, centre in zip(
        segment.parts(), (k, v), (segment.centre, None), strict=True
    ):
        writer(codec, x, source, centre, fields)


def _weakest(rank: Tensor) -> Tensor:
    """[B, Hkv] int64 index of the smallest rank [B, Hkv, N].

    Of equals the last one loses, as in merge_many's stable sort: the arrival, if it is among them.
    Where there is NaN it is the last one too: NaN equals nothing and is larger than nothing.
    """
    index = torch.arange(rank.shape[-1], device=rank.device, dtype=torch.int32)
    least = rank.amin(-1, keepdim=True)
    return torch.where(rank > least, -1, index).amax(-1).long()


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
