"""Tokens on their way into the state, and how they rank among those that a tier holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arkv_fx.kernels.reference import gather
from arkv_fx.scores import Stats
from arkv_fx.state.view import View


@dataclass
class Arrivals:
    """Tokens in native precision on their way into the state.

    ``k`` [B, Hkv, T, Dk], ``v`` [B, Hkv, T, Dv], ``pos`` [B, Hkv, N] int32 with -1 for "no
    token", ``valid`` [B, N] bool, ``stats`` [B, Hkv, N] each. ``places`` [B, Hkv, N] int64 tells
    where in k and v each of the N tokens lies, None where N is T and they lie in order: tokens
    are sorted several times, and only those that are stored in the end are worth copying.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    valid: Tensor
    stats: Stats
    places: Tensor | None = None

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """[B, Hkv, N, Dk] and [B, Hkv, N, Dv]."""
        if self.places is None:
            return self.k, self.v
        return gather(self.k, self.places), gather(self.v, self.places)


def rank_tokens(held: View, pos: Tensor, stats: Stats, now: Tensor, last: bool) -> Tensor:
    """Ranks [B, Hkv, N] of a tier's tokens and of those that come to it; -inf for no token."""
    policy = held.plan.policy()
    valid = pos >= 0
    if held.plan.sliding:  # the next query cannot see it: it is free to go
        valid = valid & (pos > now[:, None, None] + 1 - held.plan.sliding)
    age = (now[:, None, None] - pos).clamp(min=0).float()
    rank = (policy.eviction if last else policy.precision)(stats, age, valid)
    return torch.where(valid, rank, float("-inf"))
