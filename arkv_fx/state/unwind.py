"""Tokens taken back where that is easy: as long as all are held as the ring holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv_fx.state.session import LayerState
from arkv_fx.state.view import Segment, View


def holds_all(state: LayerState) -> bool:
    """Whether every token is in the ring or in a tier of its format: none was rounded or lost."""
    held = state.view()
    kept = torch.stack([(segment.pos >= 0).sum(-1) for segment in _alike(held)]).sum(0)
    return bool((kept == held.count[:, None]).all())


def unwind(state: LayerState, tokens: int) -> None:
    """Forget the last ``tokens`` of a state that holds all of them.

    What is attended to is then as if they had not been; what is left of them is that their queries
    have looked at those before, which counts when tokens have to go.
    """
    held = state.view()
    policy = held.plan.policy()
    with torch.inference_mode(False):
        held.seen.sub_(tokens)
        gone = held.pos >= held.seen[:, None, None]
        held.count.sub_(gone[:, 0].sum(-1).to(held.count.dtype))
        held.pos.masked_fill_(gone, -1)
        for stat in held.stats.values():
            stat.masked_fill_(gone, 0)
        _return_to_window(held)
        # The same order in all heads.
        pos, order = torch.cat([s.positions for s in _alike(held)], -1).sort(-1)
        keys, values = (
            torch.cat(parts, 2).gather(2, order[..., None].expand(-1, -1, -1, parts[0].shape[-1]))
            for parts in zip(*((s.k[0], s.v[0]) for s in _alike(held)), strict=True)
        )
        valid = pos[:, 0] >= 0
        # Not the channels' numbers: what is held was divided by them.
        fields = policy.layer_fields(held.plan.k_dim, held.plan.v_dim)
        sums = {f.name: torch.zeros_like(held.layer[f.name]) for f in fields}
        policy.arrive(keys, values, valid, sums)
        for name, total in sums.items():
            held.layer[name].copy_(total)
        if held.centre is not None:
            keys = torch.where(valid[:, None, :, None], keys.float(), 0.0)
            held.centre.copy_(keys.sum(2) / held.count.clamp(min=1)[:, None, None])


def _alike(held: View) -> list[Segment]:
    """The ring, and the tiers that store as it does."""
    return [s for s in held.segments if s.format is held.ring.format]


def _return_to_window(held: View) -> None:
    """Let the newest tokens of the tiers take the window's empty slots, each the one it had."""
    ring, sinks, tiers = held.ring, held.plan.sinks, _alike(held)[1:]
    missing = held.count.clamp(max=held.plan.ring) - (ring.pos[:, 0] >= 0).sum(-1)
    most = int(missing.max())
    if most == 0:
        return
    newest = torch.cat([s.positions for s in tiers], -1).topk(most).indices  # [B, Hkv, most]
    behind = torch.arange(1, most + 1, device=newest.device)
    row, which = (behind <= missing[:, None]).nonzero(as_tuple=True)
    inside = (ring.pos[:, 0, sinks:] >= 0).sum(-1)
    number = (held.count - inside)[row] - behind[which]  # how many tokens were before it
    head = torch.arange(held.plan.heads, device=newest.device)
    at = (row[:, None], head, newest[row, :, which])
    to = (row[:, None], head, (sinks + (number - sinks) % held.plan.window)[:, None])

    def move(into: Tensor, parts: list[Tensor], empty: int | None = None) -> None:
        whole = torch.cat(parts, 2)
        into[to] = whole[at]
        if empty is None:
            return
        whole[at] = empty
        for part, now in zip(parts, whole.split([p.shape[2] for p in parts], 2), strict=True):
            part.copy_(now)

    for index, field in enumerate(ring.k):
        move(field, [s.k[index] for s in tiers])
    for index, field in enumerate(ring.v):
        move(field, [s.v[index] for s in tiers])
    for name, stat in ring.stats.items():
        move(stat, [s.stats[name] for s in tiers], empty=0)
    move(ring.pos, [s.pos for s in tiers], empty=-1)
