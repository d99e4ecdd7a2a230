"""What transformers' caches answer, ours answers or refuses by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import arkv_fx
from arkv_fx.errors import ArkvError, CacheError
from arkv_fx.models import random_model

CONFIG = arkv_fx.ArkvConfig(budget=24, window=8, tiers=("native",))


@pytest.fixture(scope="module")
def model() -> Any:
    return arkv_fx.transform(random_model("llama"), CONFIG, compile="eager")


@pytest.fixture
def cache(model: Any) -> Any:
    made = arkv_fx.ArkvCache(model)
    with torch.no_grad():
        model(torch.ones(2, 30, dtype=torch.long), past_key_values=made)
    return made


def public(kind: type) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


def ask(thing: Any, name: str) -> None:
    """An answer, a refusal of ours, or a question that lacks its arguments."""
    try:
        value = getattr(thing, name)
        if callable(value) and name not in ("reset", "early_initialization"):
            value()
    except ArkvError:
        pass
    except TypeError as error:
        assert "missing" in str(error) and "argument" in str(error)
    except ValueError as error:  # transformers' own: no layer has a recurrent state
        assert "LinearAttention" in str(error)


def test_every_name_of_a_cache_and_of_a_layer(cache: Any) -> None:
    for name in [*public(Cache), "keys", "values", "is_initialized", "max_cache_len"]:
        if hasattr(Cache, name) or name in ("is_initialized", "max_cache_len"):
            if name != "prefetch":  # there is no stream without offloading, here as there
                ask(cache, name)
    for name in [*public(CacheLayerMixin), "keys", "values", "is_initialized"]:
        ask(cache.layers[0], name)


def test_layers_walk_like_any_caches(cache: Any) -> None:
    assert len(cache.layers) == len(cache) == 2
    for layer in cache.layers:
        assert layer.get_seq_length() == 30 and layer.is_initialized and layer.batch_size == 2
        assert layer.get_mask_sizes(4) == (34, 0) and not layer.is_sliding
        with pytest.raises(CacheError, match=r"layer [01] of an ArkvCache has no 'keys'"):
            layer.keys  # noqa: B018
    assert cache.is_initialized and cache.max_cache_len == -1
    for read in (lambda: list(cache), lambda: cache[0]):
        with pytest.raises(CacheError, match="does not hand out keys and values"):
            read()
    cache.activate_past_recording()  # transformers looks whether layers can
    assert not cache.is_recording_past(0)
    twin = copy.deepcopy(cache)
    cache.reset()
    assert twin.layers[0].get_seq_length() == 30 and not cache.layers[0].is_initialized


@pytest.mark.parametrize("wrong", [None, 1.5, "0", [0.0], torch.tensor([2]), torch.tensor([[0]])])
def test_wrong_sequences_are_named(cache: Any, wrong: Any) -> None:
    for name in ("batch_select_indices", "reorder_cache"):
        with pytest.raises(CacheError, match=r"(indices|beam_idx)="):
            getattr(cache, name)(wrong)
    assert cache.batch_size == 2


@pytest.mark.parametrize("wrong", [None, 0, -1, 1.5, "2", True])
def test_wrong_repeats_are_named(cache: Any, wrong: Any) -> None:
    with pytest.raises(CacheError, match="repeats="):
        cache.batch_repeat_interleave(wrong)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4


def test_only_a_transformed_model_has_a_cache() -> None:
    with pytest.raises(CacheError, match=r"ArkvCache\(None\): give the model that .*transform"):
        arkv_fx.ArkvCache(None)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="LlamaForCausalLM is not transformed"):
        arkv_fx.ArkvCache(random_model("llama"))
