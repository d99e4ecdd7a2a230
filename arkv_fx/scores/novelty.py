"""Key novelty: how little a key resembles the mean key of its head."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv_fx.scores.score import CppRank, Observation, Score, StatField, Stats


class NoveltyScore(Score):
    """1 - cosine(key, mean of the normalised keys so far), fixed when the token arrives.

    The idea of KeyDiff (arXiv 2504.15364): it finds what nobody has asked for yet, such as a
    needle, which attention cannot see.
    """

    name = "novelty"
    slot_fields = (StatField("novelty", torch.float16),)

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
        stats["novelty"] = (1 - unit.mul_(mean[:, :, None]).sum(-1)).to(torch.float16)
        return stats

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return stats

    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        return stats["novelty"].float()
