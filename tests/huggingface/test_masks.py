"""Masks of transformers while a cache of ours is in use: left out where they say nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from arkv_fx import ArkvConfig, transform
from arkv_fx.huggingface import attention_interface
from arkv_fx.huggingface.attention_interface import LEAVES_OUT, mask, mask_by_caller
from arkv_fx.models import random_model


@pytest.mark.parametrize(
    ("queries", "keys", "window", "padded", "left_out"),
    [
        (1, 9, None, False, True),
        (9, 9, None, False, True),
        (4, 9, None, False, False),
        (1, 9, None, True, False),
        (9, 9, None, True, False),
        (1, 9, 9, False, False),
        (1, 9, 10, False, True),
    ],
)
def test_a_mask_is_left_out_only_where_it_says_nothing(
    queries: int, keys: int, window: int | None, padded: bool, left_out: bool
) -> None:
    given: dict[str, Any] = {"q_offset": keys - queries, "local_size": window}
    if window is not None:
        given["mask_function"] = sliding_window_causal_mask_function(window)
    if padded:
        given["attention_mask"] = torch.arange(keys)[None] > 2
    whole = sdpa_mask(1, queries, keys, allow_is_causal_skip=False, **given)
    found = mask(1, queries, keys, **given)
    if left_out:
        assert found is None
        # What attention without a mask sees: all, or as many new tokens as there are, causally.
        every = torch.ones(queries, keys, dtype=torch.bool)
        assert torch.equal(whole[0, 0], every if queries == 1 else every.tril())
    else:
        assert found is not None and torch.equal(found, whole)


def test_one_that_must_be_there_is() -> None:
    """Of a model that adds to it: it is never left out then."""
    other = causal_mask_function
    assert mask(1, 1, 9, 8, mask_function=other, allow_is_causal_skip=False) is not None


@torch.no_grad()
def test_other_models_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With releases that leave masks out by themselves nothing is replaced; with others their own
    function is called for other models."""
    model, other = (random_model("llama", num_hidden_layers=1) for _ in range(2))
    transform(model, ArkvConfig(budget=32, window=4), compile="eager")
    model(torch.ones(1, 5, dtype=torch.long))
    if LEAVES_OUT:
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
    called: list[str] = []
    for name in ("mask", "sdpa_mask"):
        monkeypatch.setattr(
            attention_interface, name, lambda *a, name=name, **k: called.append(name)
        )
    mask_by_caller(1, 2, 3)
    with attention_interface.masks_left_out():
        mask_by_caller(1, 2, 3)
    assert called == (["sdpa_mask"] * 2 if LEAVES_OUT else ["sdpa_mask", "mask"])
    with pytest.raises((TypeError, RuntimeError, IndexError)):
        model(torch.full((1, 5), 10**6))
    assert attention_interface._in_step() is False
    assert other(torch.ones(1, 5, dtype=torch.long)).logits.shape == (1, 5, 128)
