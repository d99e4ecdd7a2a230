"""The heavy-hitter score as published (arXiv 2603.08727)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from arkv_fx.errors import ConfigError
from arkv_fx.scores.score import Observation, Score, StatField, Stats

PAPER_GAMMA = 263.8108280337562
"""Weight of the variance term, as published."""


class PaperScore(Score):
    """mean over the observed queries + gamma * variance over them, averaged over the query heads
    of the kv head, smoothed by average pooling over neighbouring kept tokens.

    While decoding it is recomputed from the current step's attention alone, where the variance
    over one query is zero. The variance is the population variance, as for the moments of the
    paper's calibration.
    """

    name = "paper"
    unexportable = "sorts all slots in every step"
    slot_fields = (StatField("mass", torch.float32),)

    def __init__(self, gamma: float = PAPER_GAMMA, kernel: float = 5) -> None:
        if kernel < 1 or kernel % 2 != 1:
            raise ConfigError(f"score option kernel={kernel!r}: must be an odd number >= 1")
        self.gamma, self.kernel = float(gamma), int(kernel)

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        weight = seen.real[:, None, None, :, None].float()
        n = weight.sum(-2).clamp(min=1.0)
        probs = seen.masked_probs()
        mean = probs.sum(-2) / n
        variance = ((probs - mean[..., None, :]).square() * weight).sum(-2) / n
        score = (mean + self.gamma * variance).mean(2)
        # Tokens of the window are not scored, nor do they lend their score to a neighbour.
        score = torch.where(seen.pos > seen.now() - seen.window, 0.0, score)
        order = seen.pos.argsort(dim=-1, stable=True)  # slots are unordered, pooling is not
        pooled = avg_pool1d(
            score.gather(-1, order), self.kernel, stride=1, padding=self.kernel // 2
        )
        return {"mass": torch.zeros_like(score).scatter(-1, order, pooled)}

    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        return stats["mass"]
