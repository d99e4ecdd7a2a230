"""Tokens taken back where that is easy: as long as the ring holds all of them."""

from __future__ import annotations

import torch

from arkv_fx.state.session import LayerState


def displaced(state: LayerState) -> bool:
    """Whether a token has left the ring."""
    return bool((state["count"] > state.plan.ring).any())


def unwind(state: LayerState, tokens: int) -> None:
    """Forget the last ``tokens`` of a state whose ring holds them all.

    What is attended to is then as if they had not been; what is left of them is that their queries
    have looked at those before, which counts when tokens have to go.
    """
    held = state.view()
    ring, policy = held.ring, held.plan.policy()
    with torch.inference_mode(False):
        held.seen.sub_(tokens)
        gone = ring.pos >= held.seen[:, None, None]
        held.count.sub_(gone[:, 0].sum(-1).to(held.count.dtype))
        ring.pos.masked_fill_(gone, -1)
        for stat in ring.stats.values():
            stat.masked_fill_(gone, 0)
        valid = ring.pos[:, 0] >= 0
        sums = {name: torch.zeros_like(total) for name, total in held.layer.items()}
        policy.arrive(ring.k[0], ring.v[0], valid, sums)
        for name, total in sums.items():
            held.layer[name].copy_(total)
        if held.centre is not None:
            keys = torch.where(valid[:, None, :, None], ring.k[0].float(), 0.0)
            held.centre.copy_(keys.sum(2) / held.count.clamp(min=1)[:, None, None])
