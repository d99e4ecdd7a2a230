"""Decayed attention mass, normalised for age, optionally weighted by the value's norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arkv_fx.errors import ConfigError
from arkv_fx.scores.half import to_half
from arkv_fx.scores.score import CppRank, Observation, Score, StatField, Stats

UNIT = 2.0**-8
"""What a mass is held in: half precision then knows masses from 2**-32 to that of 255 heads."""
HALF_UP_TO = 0.99
"""The largest decay whose average half precision holds well enough."""


class MassScore(Score):
    """An exponential moving average of the attention mass that a slot receives.

    A chunk of n queries of which only the last ones were observed moves the average by n steps
    towards their mean. ``age=1`` divides by 1 - decay**age, so that a young token is not ranked
    low for having had little time (Adam's bias correction); ``value_norm=1`` multiplies the mass
    by the norm of the value, the size of what it adds to the output (CriticalKV, arXiv
    2502.03805).

    The average is moved in float32 and held in float16, in units of 2**-8. A move of less than half
    of its last place, at most 2**-11 of it, is lost: with a decay d, a mass that is observed again
    and again is settled on but for 2**-11 / (1 - d) of it (5 % at 0.99) and 2**-33 / (1 - d). A
    slower average than 0.99 would lose more, and is held in float32.
    """

    name = "mass"

    def __init__(self, decay: float = 0.99, value_norm: float = 0, age: float = 1) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"score option decay={decay!r}: must be in [0, 1)")
        self.decay, self.use_norm, self.use_age = float(decay), bool(value_norm), bool(age)
        held = torch.float16 if self.decay <= HALF_UP_TO else torch.float32
        self.slot_fields = (StatField("mass", held),)
        if self.use_norm:
            self.slot_fields += (StatField("norm", torch.bfloat16),)

    def cpp(self) -> CppRank | None:
        return CppRank(self.decay, self.use_age)

    def arrive(self, keys: Tensor, values: Tensor, valid: Tensor, layer: Stats) -> Stats:
        stats = super().arrive(keys, values, valid, layer)
        if self.use_norm:
            stats["norm"] = values.float().norm(dim=-1).to(torch.bfloat16)
        return stats

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        mass = seen.masked_probs().sum((2, 3)) / seen.visible() / UNIT
        kept = torch.exp2(seen.steps * log2_of(self.decay))
        moved = kept * stats["mass"].float() + (1 - kept) * mass
        if self.slot_fields[0].dtype == torch.float16:
            moved = to_half(moved)
        return {**stats, "mass": moved}

    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        rank = stats["mass"].float()
        if self.use_age:
            rank = rank / (1 - torch.exp2((age + 1) * log2_of(self.decay))).clamp(min=1e-6)
        if self.use_norm:
            rank = rank * stats["norm"].float()
        return rank


def log2_of(decay: float) -> float:
    """log2 of the decay; a decay of 0 (only the current step counts) stays finite."""
    return math.log2(max(decay, 1e-30))
