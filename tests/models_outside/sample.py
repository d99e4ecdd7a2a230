"""What the tests of these models share: weights, token ids, and a budget that holds all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arkv_fx import ArkvConfig

ROOMY = ArkvConfig(budget=64, tiers=("native",))
TOLERANCE = 1e-4
VOCABULARY, TOTAL = 97, 40


def random_weights(model: nn.Module) -> nn.Module:
    """Weights with which attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(std=0.4, generator=generator)
    return model.eval()


def ids(batch: int, length: int = TOTAL, seed: int = 0) -> Tensor:
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)
