"""Half precision for statistics, rounded where it is computed and not only where it is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv_fx.runtime.operators import leaving_torch

LARGEST = 65504.0
"""The largest number of half precision."""
# Exponents and mantissas of float32, on its bits: the least normal half is 2**-14, whose last place
# is 13 bits above that of a float32.
EXPONENT, LEAST, PLACES, HALF_MORE = 0xFF << 23, 127 - 14 << 23, 13 << 23, 1 << 22


def to_half(x: Tensor) -> Tensor:
    """float32 numbers of at least 0 as the nearest of float16, the largest where they are larger.

    Inductor computes float16 in float32 and drops the rounding of a cast there and back: tokens
    would be ranked by other numbers than those that are held. So the cast is given numbers that
    need none: a sum with 1.5 * 2**23 of a half's last places has no room for less than one of them.
    """
    x = x.clamp(max=LARGEST)
    if not leaving_torch():  # no bits of float32 there, but real casts
        size = (x.view(torch.int32) & EXPONENT).clamp(min=LEAST)
        rounder = (size + (PLACES | HALF_MORE)).view(torch.float32)
        x = (x + rounder) - rounder
    return x.to(torch.float16)
