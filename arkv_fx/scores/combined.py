"""Attention decides precision; novelty decides eviction, except for what attention insists on."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv_fx.scores.mass import UNIT, MassScore
from arkv_fx.scores.novelty import NoveltyScore
from arkv_fx.scores.score import CppRank, Observation, Score, Stats, zscore

LEAST = 1e-9 / UNIT
"""Masses below it are taken for it, so that each has a logarithm; C++ has it, too."""


class CombinedScore(Score):
    """``mass`` for demotion; for eviction max(z(novelty), z(log mass) - ``margin``).

    Attention alone evicts needles, for the last queries never looked at them; novelty alone loses
    prose. So the least novel go first, but for those whose attention stands out by more than
    ``margin`` standard deviations. The z-scores are taken over the slots held now: they need no
    history and can be kept up while decoding.
    """

    name = "combined"

    def __init__(
        self, decay: float = 0.99, value_norm: float = 0, age: float = 1, margin: float = 1.5,
        values: float = 1, ahead: float = 8,
    ) -> None:  # fmt: skip
        self.mass = MassScore(decay, value_norm, age)
        self.novelty = NoveltyScore(values, ahead)
        self.margin = float(margin)
        self.slot_fields = self.mass.slot_fields + self.novelty.slot_fields
        self.layer_fields = self.novelty.layer_fields  # type: ignore[method-assign]
        self.leave, self.ahead = self.novelty.leave, self.novelty.ahead  # type: ignore[method-assign]

    def cpp(self) -> CppRank | None:
        return CppRank(self.mass.decay, self.mass.use_age, self.margin, self.ahead)

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
        # Not a sum: optimizers of ONNX graphs take out what they think adds nothing.
        attention = zscore(torch.log(self.precision(stats, age, valid).clamp(min=LEAST)), valid)
        unusual = zscore(self.novelty.precision(stats, age, valid), valid)
        return torch.maximum(unusual, attention - self.margin)
