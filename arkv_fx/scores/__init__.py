"""Scores by name. To add one: a `Score` in a file of its own and ``SCORES.add(it)``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache

from arkv_fx.errors import UnknownOptionError
from arkv_fx.registry import Registry, forgets
from arkv_fx.scores.combined import CombinedScore
from arkv_fx.scores.mass import MassScore
from arkv_fx.scores.novelty import NoveltyScore
from arkv_fx.scores.paper import PaperScore
from arkv_fx.scores.score import CppRank, Observation, Score, StatField, Stats

__all__ = ["SCORES", "CppRank", "Observation", "Score", "StatField", "Stats", "make_score"]

SCORES: Registry[type[Score]] = Registry(
    "score", (CombinedScore, MassScore, NoveltyScore, PaperScore)
)


def make_score(name: str, options: Mapping[str, float] | None = None) -> Score:
    """The score named ``name`` with its options set.

    Raises:
        UnknownOptionError: for an unknown score or an option that the score does not have.
    """
    score = SCORES.find(name)
    known = list(inspect.signature(score).parameters)
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise UnknownOptionError(f"score {name!r} has no option {unknown}; it has {known}")
    return _build(score, tuple(sorted((options or {}).items())))


@forgets
@lru_cache(maxsize=256)
def _build(score: type[Score], options: tuple[tuple[str, float], ...]) -> Score:
    return score(**dict(options))
