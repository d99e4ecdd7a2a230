"""Tokens taken back: by hand, and by prompt lookup and assisted decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM

from arkv_fx import ArkvCache, ArkvConfig, transform
from arkv_fx.errors import CacheError
from arkv_fx.models import random_model

TIGHT = ArkvConfig(budget=40, window=8)
SETTINGS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
REPEATED = torch.randint(1, 128, (1, 20), generator=torch.Generator().manual_seed(1)).repeat(1, 3)


@pytest.fixture(scope="module")
def model() -> Any:
    return transform(random_model("llama"), TIGHT, compile="eager")


def held(cache: ArkvCache) -> list[Tensor]:
    """The state's tensors; the handle is each cache's own."""
    return [t for name, t in cache.tensors().items() if name != "handle"]


@torch.no_grad()
def feed(model: Any, cache: ArkvCache, *calls: Tensor) -> Tensor:
    for ids in calls:
        logits: Tensor = model(ids, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("taken", [1, 3, 4])
def test_a_state_is_what_it_was_before_the_tokens(model: Any, taken: int) -> None:
    """Evicting and quantizing, drafts in one call or one by one; and it goes on as if they had
    never been."""
    prompt = REPEATED[:, :50]
    first, draft, later = torch.randint(1, 128, (3, 1, 5)).unbind()
    plain, cache = ArkvCache(model), ArkvCache(model)
    for both in (plain, cache):
        feed(model, both, prompt)
    cache.activate_past_recording()
    assert cache.is_croppable and not plain.is_croppable
    for both in (plain, cache):
        feed(model, both, *first.split(1, 1))
    feed(model, cache, draft)  # of five
    cache.crop(-5)
    feed(model, plain, *draft[:, : 5 - taken].split(1, 1))
    feed(model, cache, *draft.split(1, 1))
    cache.crop(-taken)
    assert cache.get_seq_length() == plain.get_seq_length()
    pairs = list(zip(held(cache), held(plain), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(
        feed(model, cache, *later.split(1, 1)), feed(model, plain, *later.split(1, 1))
    )
    # A second state, counted.
    assert cache.nbytes() >= 1.9 * plain.nbytes()


def test_as_many_as_there_are_and_no_more(model: Any) -> None:
    cache = ArkvCache(model)
    cache.activate_past_recording()
    feed(model, cache, REPEATED, *torch.randint(1, 128, (1, 100)).split(1, 1))
    cache.crop(-32)
    cache.crop(0)
    with pytest.raises(CacheError, match=r"activate_past_recording"):
        cache.crop(-64)
    for wrong in (1, -(10**6), -1.0, "1"):
        with pytest.raises(CacheError, match="crop"):
            cache.crop(wrong)  # type: ignore[arg-type]
    assert cache.get_seq_length() == REPEATED.shape[1] + 68
    cache.crop(-cache.get_seq_length())  # all: a new sequence
    assert cache.get_seq_length() == 0
    fresh = feed(model, ArkvCache(model), REPEATED[:, :9])
    torch.testing.assert_close(feed(model, cache, REPEATED[:, :9]), fresh)


def test_without_recording_what_was_displaced_is_gone(model: Any) -> None:
    cache = ArkvCache(model)
    feed(model, cache, REPEATED)
    with pytest.raises(CacheError, match=r"1 tokens cannot be taken back, 0 could"):
        cache.crop(-1)
    assert feed(model, cache, REPEATED[:, :2]).isfinite().all()  # nothing happened to it


@pytest.mark.parametrize("pad", [0, 2])
def test_without_recording_while_window_and_sinks_hold_all(model: Any, pad: int) -> None:
    """Attention is then as if the tokens had not been."""
    ids = torch.randint(1, 128, (2, 11))
    seen = torch.ones_like(ids)
    seen[1, :pad] = 0
    caches = [ArkvCache(model), ArkvCache(model)]
    with torch.no_grad():
        for cache, tokens in zip(caches, (11, 7), strict=True):
            model(ids[:, :tokens], attention_mask=seen[:, :tokens], past_key_values=cache)
        caches[0].crop(-4)
        logits = [
            model(ids[:, 7:9], attention_mask=seen[:, :9], past_key_values=cache).logits
            for cache in caches
        ]
    torch.testing.assert_close(logits[0][seen[:, 7:9].bool()], logits[1][seen[:, 7:9].bool()])
    for index, state in caches[0].session.layers.items():
        other = caches[1].session.layers[index]
        for name in ("pos", "count", "seen"):
            assert torch.equal(state[name], other[name])
        for name in ("key_sum", "centre"):
            torch.testing.assert_close(state[name], other[name])


@pytest.mark.parametrize("tiers", [("native", "native"), ("int8", "native")])
def test_without_recording_while_all_is_held_as_in_the_window(tiers: tuple[str, ...]) -> None:
    """What left the window for a tier comes back to it; then it is as if they had not been."""
    ratio = 0.0 if tiers[0] == "int8" else 0.3  # a tier of another format stays empty
    config = ArkvConfig(budget=64, window=8, sinks=2, tiers=tiers, oq_ratio=ratio, score="novelty")
    model = transform(random_model("llama", num_hidden_layers=1), config, compile="eager")
    ids = torch.randint(1, 128, (2, 60))
    seen = torch.ones_like(ids)
    seen[1, :3] = 0
    whole = ArkvCache(model)
    with torch.no_grad():
        model(ids, attention_mask=seen, past_key_values=whole)
    for kept in (58, 53, 40, 20):
        cropped, plain = copy.deepcopy(whole), ArkvCache(model)
        cropped.crop(kept - 60)
        with torch.no_grad():
            model(ids[:, :kept], attention_mask=seen[:, :kept], past_key_values=plain)
        assert cropped.get_seq_length() == kept
        (one,), (other,) = (c.session.layers.values() for c in (cropped, plain))
        ring, same = one.view().ring, other.view().ring
        assert torch.equal(ring.pos, same.pos)  # every token in the slot that it had
        held = (ring.pos >= 0)[..., None]
        for a, b in zip(ring.k + ring.v, same.k + same.v, strict=True):
            torch.testing.assert_close(a * held, b * held)
        assert torch.equal(one["pos"].sort().values, other["pos"].sort().values)
        for name in ("count", "seen", "key_sum"):
            torch.testing.assert_close(one[name], other[name])
        next_ids, next_seen = ids[:, kept : kept + 2], seen[:, : kept + 2]
        with torch.no_grad():
            logits = [
                model(next_ids, attention_mask=next_seen, past_key_values=c).logits
                for c in (cropped, plain)
            ]
        torch.testing.assert_close(*logits)


def test_layers_that_keep_everything_are_cropped() -> None:
    """A site that is not rewritten holds all tokens in full precision."""
    from arkv_fx.state.session import PlainLayer

    layer = PlainLayer()
    k, v = torch.randn(2, 1, 2, 6, 4)
    layer.append(k, v)
    layer.take_back(2)
    assert torch.equal(layer.tensors[0], k[:, :, :4]) and torch.equal(layer.tensors[1], v[:, :, :4])


def test_a_copy_or_a_selection_keeps_none_of_it(model: Any) -> None:
    cache = ArkvCache(model)
    cache.activate_past_recording()
    feed(model, cache, REPEATED, REPEATED[:, :3])
    twin = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    for one in (twin, cache):
        with pytest.raises(CacheError, match="0 could"):
            one.crop(-2)
        assert one.is_croppable  # from here on


def test_states_of_layers_that_are_no_attention_have_no_way_back() -> None:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "block_ff_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    kinds = {"layer_types": ["conv", "full_attention"]}
    hybrid = Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, **kinds)).eval()
    model = transform(hybrid, TIGHT, compile="eager")
    cache = ArkvCache(model)
    cache.activate_past_recording()
    assert not cache.is_croppable
    feed(model, cache, REPEATED, REPEATED[:, :3])
    with pytest.raises(CacheError, match="no attention"):
        cache.crop(-2)


@pytest.mark.parametrize("config", [TIGHT, ArkvConfig(budget=120, window=8, tiers=("native",))])
@pytest.mark.parametrize(
    "how", ["lookup", "assistant", pytest.param("transformed assistant", marks=pytest.mark.slow)]
)
def test_drafts_change_no_token(config: ArkvConfig, how: str) -> None:
    model, draft = random_model("llama"), random_model("llama", seed=5, num_hidden_layers=1)
    transform(model, config, compile="eager")
    want = model.generate(REPEATED, **SETTINGS)
    if how == "transformed assistant":
        transform(draft, config, compile="eager")
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": draft}
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda _, a, k: calls.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    out = model.generate(REPEATED, **SETTINGS, **options, return_dict_in_generate=True)
    assert torch.equal(out.sequences, want)
    assert max(calls[1:]) > 1  # there were drafts
    assert out.past_key_values.get_seq_length() == want.shape[1] - 1


@pytest.mark.slow
def test_drafts_under_inductor() -> None:
    """The compiled step is left for the operator while steps are written down."""
    model = transform(random_model("llama", num_hidden_layers=1), TIGHT)
    want = model.generate(REPEATED, **SETTINGS)
    assert torch.equal(model.generate(REPEATED, **SETTINGS, prompt_lookup_num_tokens=3), want)
    assert torch.equal(model.generate(REPEATED, **SETTINGS), want)


def test_a_step_that_is_not_replayed_is_noticed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arkv_fx.state import journal

    monkeypatch.setattr(journal.LayerJournal, "take_back", lambda *_: None)
    with pytest.raises(AssertionError):
        test_a_state_is_what_it_was_before_the_tokens(model, 3)


@pytest.mark.parametrize("tokens", [10, 40])
@torch.no_grad()
def test_tokens_that_see_each_other_are_not_parted(tokens: int) -> None:
    """An image in a turn: no step of it is recorded, though what is held as it came can go."""
    model = random_model("llama", num_hidden_layers=1)
    transform(model, ArkvConfig(budget=160, window=8, tiers=("native",)), compile="eager")
    caches = [ArkvCache(model), ArkvCache(model)]
    caches[1].activate_past_recording()
    turn = torch.randint(1, 128, (1, tokens))
    every = torch.zeros(1, 1, tokens, 60 + tokens)
    logits = []
    for cache in caches:
        feed(model, cache, REPEATED)
        logits.append(model(turn, attention_mask=every, past_key_values=cache).logits)
    torch.testing.assert_close(*logits)
    journal = caches[1].session.journal
    assert journal is not None
    assert all(journal.known(x.tensors) == 0 for x in caches[1].session.layers.values())
    caches[1].crop(-1)
    assert caches[1].get_seq_length() == 60 + tokens - 1
