"""Attention decides precision; attention or novelty, whichever speaks louder, decides eviction."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv_fx.ops.scores.base import Observation, Score, Stats, zscore
from arkv_fx.ops.scores.mass import MassScore
from arkv_fx.ops.scores.novelty import NoveltyScore


class CombinedScore(Score):
    """``mass`` for demotion; for eviction the larger of the two z-scores of log mass and novelty.

    Attention alone evicts needles (the last queries never looked at them), novelty alone loses
    prose: a token stays if either finds it unusual among the slots of its head. The z-score is
    taken over the slots held now, so it needs no history and can be kept up while decoding.
    ``novelty`` scales the second one.
    """

    name = "combined"

    def __init__(
        self, decay: float = 0.99, value_norm: float = 0, age: float = 1, novelty: float = 1
    ) -> None:
        self.mass = MassScore(decay, value_norm, age)
        self.novelty = NoveltyScore()
        self.weight = float(novelty)
        self.slot_fields = self.mass.slot_fields + self.novelty.slot_fields
        self.layer_fields = self.novelty.layer_fields  # type: ignore[method-assign]

    def arrive(self, keys: Tensor, values: Tensor, valid: Tensor, layer: Stats) -> Stats:
        return {
            **self.mass.arrive(keys, values, valid, layer),
            **self.novelty.arrive(keys, values, valid, layer),
        }

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return self.mass.observe(stats, seen)

    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        return self.mass.precision(stats, age, valid)

    def eviction(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        attention = zscore(torch.log(self.precision(stats, age, valid) + 1e-9), valid)
        unusual = zscore(self.novelty.precision(stats, age, valid), valid)
        return torch.maximum(attention, self.weight * unusual)
