"""Novelty: how little a token's key and value resemble the mean ones of its head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arkv_fx.errors import ConfigError
from arkv_fx.runtime.operators import leaving_torch
from arkv_fx.scores.score import CppRank, Observation, Score, StatField, Stats

TOP = 127
"""What a token opposite to the means has; one that is the mean has -TOP."""


class NoveltyScore(Score):
    """Less the cosine with the mean of the directions so far: of the key, and of the value.

    It is taken when a token arrives, the mean of both cosines, in steps of 1 / 127. When the token
    leaves the window, it is given the mean novelty of itself and the ``ahead`` tokens behind it,
    which are known by then, however they came: what stands out is a phrase, and half of one answers
    nothing. Means differ less than what they are of: they are held in steps of 1 / 254, and what is
    at right angles to the mean directions, or beyond, has all the same the largest. Ranks compare
    and z-scores have no unit, so nothing else minds.

    That novelty finds what nobody has asked for yet, such as a needle, which attention cannot see,
    is KeyDiff's idea (arXiv 2504.15364): ``values=0, ahead=0``. Values tell it better than keys, in
    which position is encoded, too (docs/quality.md).
    """

    name = "novelty"
    slot_fields = (StatField("novelty", torch.int8),)

    def __init__(self, values: float = 1, ahead: float = 8) -> None:
        if ahead != int(ahead) or not 0 <= ahead <= 64:
            raise ConfigError(f"score option ahead={ahead!r}: must be a whole number from 0 to 64")
        self.of_values, self.ahead = bool(values), int(ahead)

    def cpp(self) -> CppRank | None:
        return CppRank(ahead=self.ahead)

    def layer_fields(self, k_dim: int, v_dim: int) -> tuple[StatField, ...]:
        keys = StatField("key_sum", torch.float32, k_dim)
        values = StatField("value_sum", torch.float32, v_dim)
        return (keys, values) if self.of_values else (keys,)

    def arrive(self, keys: Tensor, values: Tensor, valid: Tensor, layer: Stats) -> Stats:
        stats = super().arrive(keys, values, valid, layer)
        code = _likeness("key_sum", keys, valid, layer)
        if self.of_values:
            code = (code + _likeness("value_sum", values, valid, layer)) / 2
        # What is no number has no code; such a cache is refused (``check_finite``).
        code = torch.where(code.isnan(), 0.0, (code * -TOP).round())
        return {**stats, "novelty": _held(code)}

    def leave(self, stats: Stats, valid: Tensor, ahead: int) -> Stats:
        codes = torch.where(valid, stats["novelty"].float(), 0.0)
        total, count = (_onward(x, ahead) for x in (codes, valid.float()))
        code = 2 * total / count.clamp(min=1.0) + TOP
        return {**stats, "novelty": _held(code.round().clamp(max=TOP))}

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return stats

    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        return stats["novelty"].float()


def _likeness(name: str, x: Tensor, valid: Tensor, layer: Stats) -> Tensor:
    """Cosines [B, Hkv, T] of x [B, Hkv, T, D] with the mean direction, which moves on."""
    unit = normalize(x.float(), dim=-1)
    unit.masked_fill_(~valid[:, None, :, None], 0.0)
    layer[name] = layer[name] + unit.sum(-2)
    mean = normalize(layer[name], dim=-1)
    return unit.mul_(mean[:, :, None]).sum(-1)


def _held(code: Tensor) -> Tensor:
    """Graphs that leave torch have bytes where they begin and end only."""
    return code if leaving_torch() else code.to(torch.int8)


def _onward(x: Tensor, ahead: int) -> Tensor:
    """Sums of each of x [..., N] and the ``ahead`` that follow, as far as there are any."""
    # Not by `pad`: under a tracer it makes a constant of a prompt's length.
    more = torch.cat([x, x.new_zeros(*x.shape[:-1], ahead)], -1)
    total = x
    for i in range(1, ahead + 1):
        total = total + more[..., i : more.shape[-1] - ahead + i]
    return total
