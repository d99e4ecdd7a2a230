"""Key channels of unlike size are made alike before keys are ranked and coded.

A channel in which a head's keys vary much more than its queries weigh it takes the codes' range
from all others, and decides the cosines by which keys are ranked. So keys are divided by one number
for each channel and queries multiplied by it, which changes no logit (SmoothQuant, arXiv
2211.10438, does it to weights). The numbers are powers of two: no bit of a key is lost by them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkv_fx.state.view import View

SCALE = "scale"
"""The state tensor that holds the numbers, [B, Hkv, Dk] float32."""
MOST = 8
"""They are no further from one than 2**MOST."""
LARGEST = 12
"""Nor do they make a key or a query larger than 2**LARGEST: far below what float16 can hold."""
DOUBT = 15
"""A prompt of so many tokens moves a channel half the way."""


def balance(q: Tensor, k: Tensor, valid: Tensor, held: View) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as the state of a balanced plan knows them, and the channels' numbers.

    The first tokens of a sequence, if they are more than one, decide its numbers for good.

    Args:
        q: [B, Hq, Q, Dk], of all or some of the new tokens; k: [B, Hkv, T, Dk].
        valid: [B, T] bool, False for padding.
    """
    scale = held.layer[SCALE]
    if k.shape[2] != 1:
        chosen = channel_scales(q, k, valid)
        scale = torch.where(held.seen[:, None, None] == 0, chosen, scale)
    return *scaled(q, k, scale), scale


def scaled(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, Hq, Q, Dk] times, keys [B, Hkv, T, Dk] divided by the channels' numbers."""
    by = scale[:, :, None]
    groups = q.shape[1] // k.shape[1]
    return q * by.repeat_interleave(groups, 1).to(q.dtype), k * by.reciprocal().to(k.dtype)


def channel_scales(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """sqrt(spread of the keys / size of the queries) by channel, [B, Hkv, Dk] float32.

    The spread is that around the mean key: what all keys share costs no precision. Rounded to
    powers of two whose geometric mean over a head is about one.
    """
    real = valid[:, None, :, None]
    keys = torch.where(real, k.float(), 0.0)
    n = valid.sum(-1, dtype=torch.float32)[:, None, None]
    mean = keys.sum(2) / n.clamp(min=1.0)
    off = torch.where(real, keys - mean[:, :, None], 0.0)
    spread = off.square().sum(2) / n.clamp(min=1.0)
    asked = q.float()
    if q.shape[2] == k.shape[2]:
        asked = torch.where(real, asked, 0.0)
    asked = asked.unflatten(1, (k.shape[1], -1))
    size = asked.square().mean((2, 3))
    known = (spread > 0) & (size > 0) & torch.isfinite(spread) & torch.isfinite(size)
    # A fourth: the square root of a quotient of squares that are not rooted yet.
    power = torch.where(known, (spread.log2() - size.log2()) / 4, 0.0)
    power = power - power.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    power = torch.where(known, power * ((n - 1) / (n + DOUBT)), 0.0).clamp(-MOST, MOST)
    highest = LARGEST - torch.log2(asked.abs().amax((2, 3)))
    lowest = torch.log2(keys.abs().amax(2)) - LARGEST
    power = torch.where(known, torch.maximum(torch.minimum(power, highest), lowest), 0.0)
    return torch.exp2(power.round())
