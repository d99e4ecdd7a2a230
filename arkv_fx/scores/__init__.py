"""Registry of scores: one file each, one line here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache

from arkv_fx.errors import UnknownOptionError
from arkv_fx.scores.combined import CombinedScore
from arkv_fx.scores.mass import MassScore
from arkv_fx.scores.novelty import NoveltyScore
from arkv_fx.scores.paper import PaperScore
from arkv_fx.scores.score import Observation, Score, StatField, Stats

__all__ = ["SCORES", "Observation", "Score", "StatField", "Stats", "make_score"]

SCORES: dict[str, type[Score]] = {
    cls.name: cls for cls in (CombinedScore, MassScore, NoveltyScore, PaperScore)
}


def make_score(name: str, options: Mapping[str, float] | None = None) -> Score:
    """The score named ``name`` with its options set.

    Raises:
        UnknownOptionError: for an unknown score or an option that the score does not have.
    """
    if name not in SCORES:
        raise UnknownOptionError(f"unknown score {name!r}; known: {sorted(SCORES)}")
    known = list(inspect.signature(SCORES[name]).parameters)
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise UnknownOptionError(f"score {name!r} has no option {unknown}; it has {known}")
    return _build(name, tuple(sorted((options or {}).items())))


@lru_cache(maxsize=256)
def _build(name: str, options: tuple[tuple[str, float], ...]) -> Score:
    return SCORES[name](**dict(options))
