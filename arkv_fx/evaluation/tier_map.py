"""The tier map: in which state each token of a real generation is, after every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.series import Numbers, Series
from arkv_fx.formats import get_format
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.plan import LayerPlan
from arkv_fx.state.session import LayerState

OCTAVE, LOWEST = 4, 161
"""Scores are kept as a quarter of an octave says them (9 % more or less), from 2**-40 on."""


@dataclass(frozen=True)
class State:
    """What a head does with a token: ``role`` is one of ``ROLES``, ``format`` how it is stored."""

    role: str
    format: str = ""


ROLES = ("window", "original", "quantized", "whole", "outside", "evicted")
"""Held in the ring (sinks and window); in the first tier; in the second; in full, by a layer that
is not compressed; no longer seen, by a layer whose attention has a window; not held."""
NOTHING = "no layer of this model caches keys and values: there is nothing to show"
OUTSIDE, EVICTED = State("outside"), State("evicted")


@dataclass
class LayerMap:
    """One layer: ``mixes`` are indices into ``TierMap.mixes``, ``scores`` see ``score_of``."""

    layer: int
    heads: int
    mixes: Series = field(default_factory=Series)
    scores: Series = field(default_factory=Series)


@dataclass
class TierMap:
    """The states of all tokens after each step, the first of which is the prompt.

    Heads of a layer decide each for itself: ``mixes`` are numbers of heads by state, in the order
    of ``states``, that occur; the first says that there is no such token yet.
    """

    states: tuple[State, ...]
    mixes: list[tuple[int, ...]]
    layers: list[LayerMap]
    lengths: list[int] = field(default_factory=list)
    """Tokens in the cache after each step."""

    def heads(self, step: int, layer: int) -> Numbers:
        """[P, S] how many heads of a layer have each of the P tokens in each state."""
        found = next(each for each in self.layers if each.layer == layer)
        return np.array(self.mixes, np.int64)[found.mixes.at(step)]

    def score(self, step: int, layer: int) -> NDArray[np.float64]:
        """[P] what the layer's score gives each token, the mean of the heads that hold it."""
        found = next(each for each in self.layers if each.layer == layer)
        return score_of(found.scores.at(step))


class Recorder(StoppingCriteria):
    """Looks into a cache after each step of ``generate()``, which it never stops.

    Attributes:
        found: the map so far, None before the first step.

    Raises:
        EvaluationError: in the first step, if nothing is cached, or of several sequences.
    """

    def __init__(
        self, cache: ArkvCache, progress: Callable[[int], None] = lambda tokens: None
    ) -> None:
        self.cache, self.progress = cache, progress
        self.found: TierMap | None = None
        self._known: dict[tuple[int, ...], int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Record, and go on: all False [B]."""
        self.record()
        self.progress(self.cache.seen)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def record(self) -> None:
        """The cache as it is now is the next step."""
        session, tokens = self.cache.session, self.cache.seen
        if self.found is None:
            self.found = self._begin()
        self.found.lengths.append(tokens)
        for each in self.found.layers:
            state = session.layers.get(each.layer)
            if state is None:
                mix = [0] * len(self.found.states)
                mix[self.found.states.index(State("whole", self._whole_format(each.layer)))] = (
                    each.heads
                )
                each.mixes.add(np.full(tokens, self._index(tuple(mix))))
                each.scores.add(np.zeros(tokens, np.int64))
                continue
            counts = count_heads(state, self.found.states, tokens)
            rows, place = np.unique(counts, axis=0, return_inverse=True)
            known = [self._index(tuple(row)) for row in rows.tolist()]
            each.mixes.add(np.array(known, np.int64)[place.reshape(-1)])
            each.scores.add(code_of(mean_scores(state, tokens)))

    def _begin(self) -> TierMap:
        session = self.cache.session
        if self.cache.batch_size > 1:
            raise EvaluationError("a tier map is of one sequence: give one prompt")
        states = {State("whole", self._whole_format(layer)) for layer in session.plain}
        for state in session.layers.values():
            states.update(segment_states(state.plan), [EVICTED], [OUTSIDE] * state.plan.sliding)
        layers = [LayerMap(index, s.plan.heads) for index, s in session.layers.items()]
        layers += [LayerMap(i, plain.tensors[0].shape[1]) for i, plain in session.plain.items()]
        if not layers:
            raise EvaluationError(NOTHING)
        ordered = sorted(states, key=lambda state: (ROLES.index(state.role), state.format))
        nothing = (0,) * len(ordered)
        self._known = {nothing: 0}
        return TierMap(tuple(ordered), [nothing], sorted(layers, key=lambda each: each.layer))

    def _whole_format(self, layer: int) -> str:
        return str(self.cache.session.plain[layer].tensors[0].dtype).removeprefix("torch.")

    def _index(self, mix: tuple[int, ...]) -> int:
        assert self.found is not None
        if mix not in self._known:
            self._known[mix] = len(self.found.mixes)
            self.found.mixes.append(mix)
        return self._known[mix]


def record(
    model: PreTrainedModel,
    cache: ArkvCache,
    ids: Tensor,
    tokens: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[TierMap, list[int]]:
    """Generate greedily into an empty cache of a transformed model: its map, and the new tokens.

    Args:
        ids: the prompt [1, T] int64.
        tokens: how many to generate at most; the last one never enters the cache.
        progress: called with how many tokens the cache holds or has held.

    Raises:
        EvaluationError: if nothing is cached.
    """
    if all(cache.is_linear):
        raise EvaluationError(NOTHING)
    recorder = Recorder(cache, progress)
    result: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([recorder]),
    )
    assert recorder.found is not None
    return recorder.found, result[0, ids.shape[1] :].tolist()


def segment_states(plan: LayerPlan) -> list[State]:
    """The state of a token in each segment of a layer: the ring, then the tiers.

    Tiers of one format are one: the last one is held as two, of two orders of eviction.
    """
    formats = list(dict.fromkeys(tier.format for tier in plan.tiers))
    native = str(plan.dtype).removeprefix("torch.")
    names = {name: native if name == "native" else name for name in (*formats, plan.window_format)}

    def role(name: str) -> str:
        known = get_format(name)
        alone = len(formats) == 1 and not (known.key.plain and known.value.plain)
        return "quantized" if alone or formats.index(name) > 0 else "original"

    ring = State("window", names[plan.window_format])
    return [ring, *(State(role(tier.format), names[tier.format]) for tier in plan.tiers)]


def count_heads(state: LayerState, states: Sequence[State], tokens: int) -> Numbers:
    """[tokens, S] heads of the one sequence of a layer that have each token in each state."""
    held = state.view()
    found = np.full((state.plan.heads, tokens), states.index(EVICTED))
    for segment, where in zip(held.segments, segment_states(state.plan), strict=True):
        positions = segment.positions[0].cpu().numpy()
        head, slot = np.nonzero(positions >= 0)
        found[head, positions[head, slot]] = states.index(where)
    if state.plan.sliding:  # the next query sees what is less than a window before it
        found[:, : max(0, tokens - state.plan.sliding + 1)] = states.index(OUTSIDE)
    return np.stack([(found == i).sum(0) for i in range(len(states))], -1)


def mean_scores(state: LayerState, tokens: int) -> NDArray[np.float64]:
    """[tokens] the rank that decides a token's precision, a mean over the heads that hold it."""
    held = state.view()
    positions = held.positions
    age = (held.seen[:, None, None] - positions).clamp(min=0).float()
    rank = state.plan.policy().precision(held.stats, age, positions >= 0)[0].double()
    head, slot = torch.nonzero(positions[0] >= 0, as_tuple=True)
    where, what = positions[0][head, slot].cpu().numpy(), rank[head, slot].cpu().numpy()
    total = np.bincount(where, what, minlength=tokens)
    return np.asarray(total / np.maximum(1, np.bincount(where, minlength=tokens)))


def code_of(scores: NDArray[np.float64]) -> Numbers:
    """Scores as whole numbers: 0 for none, else sign and logarithm."""
    scores = np.nan_to_num(scores, posinf=2.0**80, neginf=-(2.0**80))
    size = np.abs(scores)
    steps = np.rint(OCTAVE * np.log2(np.where(size > 0, size, 1))).astype(np.int64) + LOWEST
    return np.where(size > 0, np.sign(scores).astype(np.int64) * np.maximum(steps, 1), 0)


def score_of(codes: Numbers) -> NDArray[np.float64]:
    """Inverse of ``code_of``, to 9 %."""
    return np.asarray(np.sign(codes) * np.exp2((np.abs(codes) - LOWEST) / OCTAVE))
