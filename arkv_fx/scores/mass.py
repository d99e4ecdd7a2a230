"""Decayed attention mass, normalised for age, optionally weighted by the value's norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arkv_fx.errors import ConfigError
from arkv_fx.scores.score import CppRank, Observation, Score, StatField, Stats


class MassScore(Score):
    """An exponential moving average of the attention mass that a slot receives.

    A chunk of n queries of which only the last ones were observed moves the average by n steps
    towards their mean. ``age=1`` divides by 1 - decay**age, so that a young token is not ranked
    low for having had little time (Adam's bias correction); ``value_norm=1`` multiplies the mass
    by the norm of the value, the size of what it adds to the output (CriticalKV, arXiv
    2502.03805).
    """

    name = "mass"

    def __init__(self, decay: float = 0.99, value_norm: float = 0, age: float = 1) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"score option decay={decay!r}: must be in [0, 1)")
        self.decay, self.use_norm, self.use_age = float(decay), bool(value_norm), bool(age)
        self.slot_fields = (StatField("mass", torch.float32),)
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
        mass = seen.masked_probs().sum((2, 3)) / seen.visible()
        kept = torch.exp2(seen.steps * log2_of(self.decay))
        return {**stats, "mass": kept * stats["mass"] + (1 - kept) * mass}

    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        rank = stats["mass"]
        if self.use_age:
            rank = rank / (1 - torch.exp2((age + 1) * log2_of(self.decay))).clamp(min=1e-6)
        if self.use_norm:
            rank = rank * stats["norm"].float()
        return rank


def log2_of(decay: float) -> float:
    """log2 of the decay; a decay of 0 (only the current step counts) stays finite."""
    return math.log2(max(decay, 1e-30))
