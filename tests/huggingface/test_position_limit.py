"""Where a model and its configuration speak of short texts, a longer one is refused in time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arkv_fx import ArkvCache, ArkvConfig, plan, restore, transform
from arkv_fx.errors import CacheError
from arkv_fx.huggingface.layers import positions_to_come
from arkv_fx.models import random_model

CONFIG = ArkvConfig(budget=32, window=8, context=48)
LIMIT = 64
REFUSED = r"positions up to 64: it has had {} tokens and {} more.*ArkvConfig\(context=N\)"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if int16 numbered 64 tokens: they come quickly."""
    monkeypatch.setattr(plan, "SHORT", LIMIT)


def llama(config: ArkvConfig = CONFIG, compile: str = "eager", **options: Any) -> Any:
    model = random_model("llama", num_hidden_layers=2, max_position_embeddings=40, **options)
    return transform(model, config, False, compile=compile)


def ids(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def held(cache: ArkvCache) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in cache.tensors().items()}


@pytest.mark.parametrize("compile", ["eager", "inductor"])
@torch.no_grad()
def test_nothing_has_changed_when_it_is_refused(few: None, compile: str) -> None:
    model = llama(compile=compile)
    cache = ArkvCache(model)
    model(ids(50), past_key_values=cache)
    before, mask = held(cache), cache.session.mask
    twin = copy.deepcopy(cache)
    more = ids(15, seed=1)
    given = {"attention_mask": torch.ones(1, 65, dtype=torch.long)}
    for call in ({"input_ids": more}, {"inputs_embeds": model.get_input_embeddings()(more)}):
        with pytest.raises(CacheError, match=REFUSED.format(50, 15)):
            model(**call, **given, past_key_values=cache)
    after = cache.tensors()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert cache.session.mask is mask and cache.get_seq_length() == 50
    # It goes on with what fits, as one that has refused nothing.
    for token in ids(14, seed=2).split(1, 1):
        one, two = (model(token, past_key_values=x).logits for x in (cache, twin))
        assert torch.equal(one, two)
    with pytest.raises(CacheError, match=REFUSED.format(64, 1)):
        model(ids(1), past_key_values=cache)
    cache.crop(-cache.seen)
    model(ids(64), past_key_values=cache)


@torch.no_grad()
def test_the_graphs_runner_sees_what_no_argument_tells(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    monkeypatch.setattr(model.arkv, "_require_room", lambda *_: None)
    cache = ArkvCache(model)
    model(ids(60), past_key_values=cache)
    before = held(cache)
    with pytest.raises(CacheError, match=REFUSED.format(60, 5)):
        model(ids(5), past_key_values=cache)
    after = cache.tensors()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    model(ids(4), past_key_values=cache)
    with pytest.raises(CacheError, match=REFUSED.format(64, 1)):
        model(ids(1), past_key_values=cache)


def test_a_larger_context_goes_on(few: None) -> None:
    """Negative control: as the message says. Nothing else is another with it."""
    prompt = ids(50, rows=2)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    short = llama()
    with pytest.raises(CacheError, match=REFUSED.format(64, 1)):
        short.generate(prompt, **options)
    cache = ArkvCache(short)
    some = short.generate(prompt, past_key_values=cache, max_new_tokens=14, do_sample=False)
    assert cache.tensors()["0.pos"].dtype == torch.int16
    long = transform(restore(short), CONFIG.replace(context=80), False, compile="eager")
    cache = ArkvCache(long)
    whole = long.generate(prompt, past_key_values=cache, **options)
    assert cache.tensors()["0.pos"].dtype == torch.int32
    assert torch.equal(whole[:, : some.shape[1]], some) and whole.shape[1] == 80


def test_what_is_spoken_of() -> None:
    model = random_model("llama", max_position_embeddings=100)
    for config, most in (
        (ArkvConfig(context=48), 100), (ArkvConfig(context=200), 200),
        (ArkvConfig(budget=300, context=48), 300), (ArkvConfig(context=10**6), 10**6),
    ):  # fmt: skip
        assert positions_to_come(model, config) == most
    assert positions_to_come(torch.nn.Linear(1, 1), ArkvConfig(context=48)) is None


@torch.no_grad()
def test_bytes_of_a_slot_in_a_cache() -> None:
    """Five, or seven where positions may be large."""
    sizes = {}
    for context in (48, 40_000):
        for budget in (40, 72):
            config = CONFIG.replace(budget=budget, context=context, tiers=("int8",))
            model = llama(config)
            cache = ArkvCache(model)
            model(ids(64), past_key_values=cache)
            sizes[context, budget] = cache.nbytes()
    layers, heads, dim = 2, 2, model.config.head_dim
    assert model.config.num_key_value_heads == heads
    for context, size in ((48, 5), (40_000, 7)):
        more = sizes[context, 72] - sizes[context, 40]
        assert more == layers * heads * 32 * (size + 2 * (dim + 2))


@torch.no_grad()
def test_a_saved_cache_keeps_its_limit(few: None, tmp_path: Path) -> None:
    model = llama()
    cache = ArkvCache(model)
    model(ids(60), past_key_values=cache)
    cache.save(tmp_path / "x")
    loaded = ArkvCache.load(tmp_path / "x", model)
    assert loaded.tensors()["1.pos"].dtype == torch.int16
    with pytest.raises(CacheError, match=REFUSED.format(60, 5)):
        model(ids(5), past_key_values=loaded)
    a, b = (model(ids(4), past_key_values=x).logits for x in (cache, loaded))
    assert torch.equal(a, b)
    other = transform(restore(model), CONFIG.replace(context=80), False, compile="eager")
    with pytest.raises(CacheError, match="another configuration"):
        ArkvCache.load(tmp_path / "x", other)


@torch.no_grad()
def test_rows_and_drafts(few: None) -> None:
    """Beams and repeated rows keep short positions; drafts beyond the limit are refused."""
    model = llama()
    cache = ArkvCache(model)
    cache.activate_past_recording()
    model(ids(50, rows=2), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 0, 0]))
    model(ids(8, rows=4), past_key_values=cache)
    before = held(cache)
    model(ids(5, rows=4), past_key_values=cache)
    cache.crop(-5)
    after = cache.tensors()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert after["0.pos"].dtype == torch.int16
    with pytest.raises(CacheError, match=REFUSED.format(58, 7)):
        model(ids(7, rows=4), past_key_values=cache)
