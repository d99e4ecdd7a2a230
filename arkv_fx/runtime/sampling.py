"""Choosing the next token from logits, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arkv_fx.errors import EngineError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: ``temperature=0`` takes the likeliest.

    ``top_k`` > 0 leaves the k likeliest; ``top_p`` < 1 the fewest that have that much probability
    together, after the temperature; ``seed`` makes a run repeatable.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        number, whole = (int, float, np.integer, np.floating), (int, np.integer)
        checks: tuple[tuple[str, tuple[type, ...], str, Callable[[Any], bool]], ...] = (
            ("temperature", number, "a number >= 0", lambda x: 0 <= x < math.inf),
            ("top_k", whole, "a whole number >= 0", lambda x: x >= 0),
            ("top_p", number, "a number above 0 and at most 1", lambda x: 0 < x <= 1),
            ("seed", (*whole, type(None)), "a whole number >= 0 or None", lambda x: (x or 0) >= 0),
        )
        for name, kinds, allowed, fits in checks:
            value = getattr(self, name)
            if not isinstance(value, kinds) or not fits(value):
                raise EngineError(f"{name}={value!r}: must be {allowed}")

    def generator(self) -> np.random.Generator:
        """The source of randomness of one run."""
        return np.random.default_rng(self.seed)

    def choose(
        self, logits: NDArray[np.float32], generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Tokens [B] from logits [B, vocabulary]."""
        if self.temperature == 0:
            return np.asarray(logits.argmax(-1), np.int64)
        rows = [self._one(row, generator) for row in logits.astype(np.float64)]
        return np.array(rows, dtype=np.int64)

    def _one(self, logits: NDArray[np.float64], generator: np.random.Generator) -> int:
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        scaled = (logits[order] - logits[order[0]]) / self.temperature
        probs = np.exp(scaled)
        probs /= probs.sum()
        if self.top_p < 1:  # the token that reaches top_p is in
            count = int((probs.cumsum() - probs < self.top_p).sum())
            order, probs = order[:count], probs[:count] / probs[:count].sum()
        return int(generator.choice(order, p=probs))
