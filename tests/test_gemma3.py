"""Gemma3-270M, whose layers are sliding but for every sixth, on real text and beyond its window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from arkv_fx import ArkvCache, ArkvConfig, models, restore, texts, transform

PROMPT, STEPS, WINDOW = 1500, 16, 512
FULL = (5, 11, 17)
TOLERANCE = 1e-4
ROOMY = ArkvConfig(budget=2048, tiers=("native",))

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Setup:
    """The model, token ids [1, PROMPT + STEPS] and its own logits [STEPS + 1, vocabulary]."""

    model: PreTrainedModel
    ids: Tensor
    expected: Tensor


@torch.no_grad()
def logits(
    model: PreTrainedModel, ids: Tensor, cache: Any, damage: Callable[[Any], None] | None = None
) -> Tensor:
    """After the prompt and after each of the text's next tokens, taken one at a time."""
    out = []
    for new in [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)]:
        out.append(model(input_ids=new, past_key_values=cache, logits_to_keep=1).logits[:, -1])
        if damage and len(out) == 1:
            damage(cache)
    return torch.cat(out)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def setup() -> Setup:
    model, tokenizer = models.load("gemma3-270m")
    text = texts.read("state_of_the_union_1862")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : PROMPT + STEPS]
    expected = logits(model, ids, DynamicCache(config=model.config))
    assert len(expected.argmax(-1).unique()) > 5, "a model that repeats itself tests nothing"
    return Setup(model, ids, expected)


@contextmanager
def transformed(setup: Setup, config: ArkvConfig) -> Iterator[PreTrainedModel]:
    transform(setup.model, config, compile="eager")
    try:
        yield setup.model
    finally:
        restore(setup.model)


def test_with_room_for_all_it_answers_as_before(setup: Setup) -> None:
    with transformed(setup, ROOMY) as model:
        cache = ArkvCache(model)
        assert difference(logits(model, setup.ids, cache), setup.expected) <= TOLERANCE
        assert model.arkv.report().fused == 18 and not cache.session.plain
        for layer, state in cache.session.layers.items():
            held = int((state.view().pos >= 0).sum())
            assert held == (PROMPT + STEPS if layer in FULL else WINDOW)

        def lose_the_last_token(of: int, cache: ArkvCache) -> None:
            pos = cache.session.layers[of].view().pos
            pos[pos == PROMPT - 1] = -1

        for layer in (0, *FULL):  # negative controls, in a sliding layer and in all global ones
            damage = partial(lose_the_last_token, layer)
            found = logits(model, setup.ids, ArkvCache(model), damage)
            assert difference(found[0], setup.expected[0]) <= TOLERANCE
            assert difference(found[1:], setup.expected[1:]) > TOLERANCE, layer


def test_sliding_layers_keep_their_window_and_global_ones_the_budget(setup: Setup) -> None:
    budget = 768  # tokens: more than the window, fewer than the text
    with transformed(setup, ArkvConfig(budget=budget)) as model:
        cache = ArkvCache(model)
        found = logits(model, setup.ids, cache)
        assert model.arkv.report().fused == 18
    for layer, state in cache.session.layers.items():
        pos = state.view().pos
        assert state.plan.sliding == (0 if layer in FULL else WINDOW)
        assert state.plan.slots == (budget if layer in FULL else WINDOW)
        assert int((pos >= 0).sum()) == state.plan.slots, "slots are left empty"
        if layer not in FULL:  # the next query will see itself and one token less than a window
            window = set(range(PROMPT + STEPS - WINDOW + 1, PROMPT + STEPS))
            assert window <= set(pos.flatten().tolist()), "a token of the window is gone"
    assert TOLERANCE < difference(found, setup.expected) < 0.3  # it evicts, and still works
