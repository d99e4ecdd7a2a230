"""Tokens at positions that the cache holds already are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import arkv_fx
from arkv_fx.errors import CacheError
from arkv_fx.models import random_model

CONFIG = arkv_fx.ArkvConfig(budget=128, window=8, tiers=("native",))
KIND: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def ids(tokens: int = 30) -> Tensor:
    return torch.randint(1, 128, (1, tokens), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Any:
    return arkv_fx.transform(random_model("llama"), CONFIG, compile="eager")


def holding(model: Any, tokens: Tensor) -> arkv_fx.ArkvCache:
    cache = arkv_fx.ArkvCache(model)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache


def test_a_prompt_that_is_held_whole(model: Any) -> None:
    expected = model.generate(ids(), **KIND)
    for held in (29, 30):
        cache = holding(model, ids()[:, :held])
        found = model.generate(ids(), past_key_values=cache, **KIND)
        assert torch.equal(found, expected) and cache.get_seq_length() == 34


def test_a_prompt_that_is_held_whole_and_cannot_begin_again() -> None:
    """Its last token displaced another, which is quantized."""
    small = arkv_fx.ArkvConfig(budget=20, window=8, sinks=2)
    model = arkv_fx.transform(random_model("llama", num_hidden_layers=1), small, compile="eager")
    with pytest.raises(CacheError, match="holds all 30 tokens of the prompt"):
        model.generate(ids(), past_key_values=holding(model, ids()), **KIND)


def test_a_prompt_shorter_than_the_cache(model: Any) -> None:
    cache = holding(model, ids())
    for prompt in (ids()[:, :20], ids(5)):
        with pytest.raises(CacheError, match="the cache holds 30 already: hand generate"):
            model.generate(prompt, past_key_values=cache, **KIND)


@pytest.mark.parametrize("start", [0, 29])
@torch.no_grad()
def test_positions_go_back(model: Any, start: int) -> None:
    for tokens in (2, 4):
        positions = torch.arange(start, start + tokens)[None]
        with pytest.raises(
            CacheError, match=f"position {start} where the cache holds 30.*on purpose"
        ):
            model(ids(tokens), position_ids=positions, past_key_values=holding(model, ids()))
    cache = holding(model, ids())
    model(ids(4), position_ids=torch.arange(30, 34)[None], past_key_values=cache)
    assert cache.get_seq_length() == 34


@torch.no_grad()
def test_padding_has_any_position(model: Any) -> None:
    mask = torch.ones(2, 34, dtype=torch.long)
    mask[0, :7], mask[1, 30:32] = 0, 0  # padded before the first turn, and before the second
    prompt, turn = ids().expand(2, -1), ids(4).expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) * mask
    cache = arkv_fx.ArkvCache(model)
    first = {"attention_mask": mask[:, :30], "position_ids": positions[:, :30]}
    model(prompt, past_key_values=cache, **first)
    model(turn, past_key_values=cache, attention_mask=mask, position_ids=positions[:, 30:])
    assert cache.get_seq_length() == 34
    with pytest.raises(CacheError, match="position 26"):
        model(
            turn[:, :2], past_key_values=cache, position_ids=torch.tensor([[26, 27], [32, 33]]),
            attention_mask=torch.nn.functional.pad(mask, (0, 2), value=1),
        )  # fmt: skip
