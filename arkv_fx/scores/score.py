"""What a score is: per-slot statistics, and the two orders (demotion, eviction) read off them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Stats = dict[str, Tensor]


@dataclass(frozen=True)
class StatField:
    """One statistic per slot (or, in ``layer_fields``, per kv head): name, dtype, width."""

    name: str
    dtype: torch.dtype
    width: int = 1


@dataclass(frozen=True)
class Observation:
    """What one step (or the last queries of a chunk) attended to, over N columns.

    Columns are the ring, the tiers and the new tokens; empty ones have ``pos`` -1 and zero
    probability.

    Args:
        probs: [B, Hkv, G, Q, N] float32 attention probabilities of the Q observed queries.
        real: [B, Q] bool, which of those queries are real (not padding).
        query_pos: [B, Q] int, their absolute positions, one after the other.
        pos: [B, Hkv, N] int, absolute position of each column.
        steps: [B, Hkv, N] float32, how many queries came since the column was last observed.
        window: tokens that are always kept; columns younger than that need no score.
        padded: whether there may be padding among the queries.
    """

    probs: Tensor
    real: Tensor
    query_pos: Tensor
    pos: Tensor
    steps: Tensor
    window: int
    padded: bool = True

    def now(self) -> Tensor:
        """[B, 1, 1] position of the newest query."""
        return self.query_pos[:, -1, None, None]

    def masked_probs(self) -> Tensor:
        """``probs`` with padding queries zeroed."""
        if not self.padded:
            return self.probs
        return torch.where(self.real[:, None, None, :, None], self.probs, 0.0)

    def visible(self) -> Tensor:
        """[B, Hkv, N] how many observed queries could see each column, at least 1."""
        if self.query_pos.shape[1] == 1:
            return torch.ones_like(self.pos, dtype=torch.float32)
        # Queries stand side by side: all from some place on see a column.
        first = (self.pos - self.query_pos[:, :1, None]).clamp(min=0).flatten(1)
        later = self.real.flip(-1).cumsum(-1).flip(-1)
        # Not by `pad`: under a tracer it makes a constant of a prompt shorter than the window.
        real = torch.cat([later, torch.zeros_like(later[:, :1])], -1)
        count = real.gather(-1, first.clamp(max=real.shape[-1] - 1).long())
        return count.view(self.pos.shape).clamp(min=1).float()


@dataclass(frozen=True)
class CppRank:
    """How the C++ step ranks: by the statistics mass, norm and novelty, those of ``slot_fields``.

    ``decay`` of the mass; ``age`` whether masses are normalised for age; novelty decides eviction
    but where log mass stands out by ``margin``. With ``ahead``, what a token that leaves the window
    has is that of ``NoveltyScore.leave``.
    """

    decay: float = 0.0
    age: bool = False
    margin: float = 0.0
    ahead: int = 0


class Score(ABC):
    """Ranks the slots of a kv head; a larger rank is kept longer.

    A new score is one subclass in one file and ``SCORES.add``. Everything must trace: no branch on
    tensor values.
    """

    name: ClassVar[str]
    unexportable: ClassVar[str] = ""
    """Why it cannot be part of exported graphs, as the predicate of a sentence; "" if it can."""
    slot_fields: tuple[StatField, ...] = ()
    ahead: int = 0
    """On how many tokens behind it hangs what ``leave`` says of one; 0: nothing is asked."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "cpp" not in vars(cls):  # not inherited: a subclass may rank otherwise
            cls.cpp = Score.cpp  # type: ignore[method-assign]

    def cpp(self) -> CppRank | None:
        """What the C++ step needs to rank as this score does; None: it cannot."""
        return None

    def layer_fields(self, k_dim: int, v_dim: int) -> tuple[StatField, ...]:
        """Statistics kept once per kv head (running sums)."""
        return ()

    @property
    def two_orders(self) -> bool:
        """Whether ``eviction`` ranks otherwise than ``precision``."""
        return type(self).eviction is not Score.eviction

    def arrive(self, keys: Tensor, values: Tensor, valid: Tensor, layer: Stats) -> Stats:
        """Statistics of new tokens before anyone attended to them.

        Args:
            keys: [B, Hkv, T, Dk], already with position encoding; values likewise.
            valid: [B, T] bool, False for padding.
            layer: the running sums of ``layer_fields``; replaced in the dict when they move on.
        """
        shape = keys.shape[:-1]
        return {f.name: keys.new_zeros(shape, dtype=f.dtype) for f in self.slot_fields}

    def leave(self, stats: Stats, valid: Tensor, ahead: int) -> Stats:
        """Statistics of tokens as they leave the window, given those that came behind them.

        Args:
            ahead: how many of these to look at: those of the score, or what the window has.
            stats: [B, Hkv, N] each, of tokens one after the other.
            valid: [B or 1, Hkv or 1, N] bool, False for padding and for none.
        """
        return stats

    @abstractmethod
    def observe(self, stats: Stats, seen: Observation) -> Stats:
        """Statistics [B, Hkv, N] of all columns after the observation."""

    @abstractmethod
    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        """Rank that decides demotion to a cheaper format.

        Args:
            stats: [B, Hkv, N] each.
            age: [B, Hkv, N] float32 tokens since the slot's token, 0 for the newest.
            valid: [B, Hkv, N] bool, False for empty slots (their rank is ignored).
        """

    def eviction(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        """Rank that decides eviction; the same as ``precision`` unless a score knows better."""
        return self.precision(stats, age, valid)


def zscore(x: Tensor, valid: Tensor) -> Tensor:
    """(x - mean) / std over the valid slots of each head, so that unlike scores compare."""
    weight = valid.float()
    n = weight.sum(-1, keepdim=True).clamp(min=1.0)
    mean = (x * weight).sum(-1, keepdim=True) / n
    var = ((x - mean).square() * weight).sum(-1, keepdim=True) / n
    return (x - mean) / var.sqrt().clamp(min=1e-6)
