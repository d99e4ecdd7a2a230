"""Key novelty: how little a key resembles the mean key of its head."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv_fx.runtime.operators import leaving_torch
from arkv_fx.scores.score import CppRank, Observation, Score, StatField, Stats

TOP = 127
"""What a key opposite to the mean has; one that is the mean has -TOP."""


class NoveltyScore(Score):
    """-cosine(key, mean of the normalised keys so far), fixed when the token arrives.

    It is held in steps of 1 / 127. Ranks compare and z-scores have no unit, so nothing else minds.

    The idea of KeyDiff (arXiv 2504.15364): it finds what nobody has asked for yet, such as a
    needle, which attention cannot see.
    """

    name = "novelty"
    slot_fields = (StatField("novelty", torch.int8),)

    def cpp(self) -> CppRank | None:
        return CppRank()

    def layer_fields(self, k_dim: int) -> tuple[StatField, ...]:
        return (StatField("key_sum", torch.float32, k_dim),)

    def arrive(self, keys: Tensor, values: Tensor, valid: Tensor, layer: Stats) -> Stats:
        stats = super().arrive(keys, values, valid, layer)
        unit = torch.nn.functional.normalize(keys.float(), dim=-1)
        unit.masked_fill_(~valid[:, None, :, None], 0.0)
        layer["key_sum"] = layer["key_sum"] + unit.sum(-2)
        mean = torch.nn.functional.normalize(layer["key_sum"], dim=-1)
        cosine = unit.mul_(mean[:, :, None]).sum(-1)
        # What is no number has no code; such a cache is refused (``check_finite``).
        code = torch.where(cosine.isnan(), 0.0, (cosine * -TOP).round())
        # Graphs that leave torch have bytes where they begin and end only.
        stats["novelty"] = code if leaving_torch() else code.to(torch.int8)
        return stats

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return stats

    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        return stats["novelty"].float()
