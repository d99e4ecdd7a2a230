"""How many graphs are compiled, and what a decode step allocates: neither grows with the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel

from arkv_fx import ArkvCache, ArkvConfig, models, transform
from arkv_fx.compile.backend import ArkvBackend

GRAPHS = 2  # one for prompts of every length, one for the decode step
GRAPHS_OF_TORCH_COMPILE = 5  # there nobody tells Dynamo which extents will change
PROMPTS, STEPS = (11, 64, 37), 200
SMALL = ArkvConfig(budget=48, window=8, sinks=2)


def prompt(length: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 128, (batch, length), generator=generator)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = models.random_model("llama", num_hidden_layers=1)
    transform(model, SMALL, compile="eager")
    return model


def test_generation_compiles_two_graphs(model: PreTrainedModel) -> None:
    backend = model.arkv.backend
    compiled = []
    for length in PROMPTS:
        out = model.generate(prompt(length), max_new_tokens=STEPS, do_sample=False)
        assert out.shape[1] == length + STEPS
        compiled.append(backend.graphs)
    assert compiled == [GRAPHS] * 3
    assert backend.calls == 3 * STEPS


def test_steady_decoding_compiles_nothing(model: PreTrainedModel) -> None:
    cache = ArkvCache(model)
    new = model(prompt(20), past_key_values=cache).logits[:, -1:].argmax(-1)
    sizes, before = set(), 0
    for step in range(60):
        if step == 1:
            before = model.arkv.backend.graphs
        new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
        sizes.add(cache.nbytes())
    assert model.arkv.backend.graphs == before
    assert len(sizes) == 1, "the cache grows"
    # The report tells the same bytes; a cache has its handle besides.
    assert sizes == {model.arkv.report().nbytes + 8}


def test_a_graph_for_every_length_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the hint that lengths change, and without Dynamo's own guess."""
    model = models.random_model("llama", num_hidden_layers=1)
    transform(model, SMALL, compile="eager")
    monkeypatch.setattr(type(model.arkv), "_mark_lengths", lambda *_: None)
    with torch._dynamo.config.patch(assume_static_by_default=True, automatic_dynamic_shapes=False):
        for length in (5, 6):
            model.generate(prompt(length), max_new_tokens=2, do_sample=False)
    assert model.arkv.backend.graphs > GRAPHS


@torch.no_grad()
def test_torch_compile_compiles_few_graphs() -> None:
    model = models.random_model("llama", num_hidden_layers=1)
    backend = ArkvBackend(SMALL, compile="eager")
    call = torch.compile(model, backend=backend)
    for length in PROMPTS:
        cache = DynamicCache(config=model.config)
        new = call(prompt(length), past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(30):
            new = call(new, past_key_values=cache).logits[:, -1:].argmax(-1)
    assert backend.graphs <= GRAPHS_OF_TORCH_COMPILE
    assert all(site.fused for sites in backend.sites for site in sites)


def peak(call: Callable[[], Any]) -> int:
    """Most bytes that were allocated at once during a call, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@torch.no_grad()
def decode_peaks(model: PreTrainedModel, cache: Any) -> list[int]:
    """Peaks of a decode step after 60, 120 and 240 tokens."""
    peaks = []
    new = model(prompt(57), past_key_values=cache).logits[:, -1:].argmax(-1)
    for step in range(58, 242):
        if step in (61, 121, 241):
            peaks.append(peak(lambda token=new: model(token, past_key_values=cache)))  # type: ignore[misc]
        else:
            new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
    return peaks


def test_a_decode_step_allocates_the_same_however_long_the_text(model: PreTrainedModel) -> None:
    peaks = decode_peaks(model, ArkvCache(model))
    assert peaks[0] > 0 and max(peaks) - min(peaks) <= 64, peaks


def test_a_growing_cache_is_noticed() -> None:
    """Negative control: the full cache is copied in every step."""
    full = models.random_model("llama", num_hidden_layers=1)
    peaks = decode_peaks(full, DynamicCache(config=full.config))
    assert peaks[2] > 1.5 * peaks[0], peaks


@torch.no_grad()
def test_a_prompt_after_a_conversation_still_knows_that_its_cache_is_empty() -> None:
    """Dynamo then takes the tokens so far for a variable; the prompt must keep fused attention."""
    model = models.random_model("llama", num_hidden_layers=1)
    transform(model, SMALL, compile="eager")
    cache = ArkvCache(model)
    for length in (20, 9):
        model(prompt(length), past_key_values=cache)
    model(prompt(30, batch=2))
    fresh = [[site.cache.fresh for site in sites] for sites in model.arkv.backend.sites]
    assert fresh == [[True], [False], [True]]


def padded_step(model: PreTrainedModel, hide: int | None = None) -> tuple[Tensor, list[bool]]:
    """Logits of a second decoded token after a left-padded prompt; masks in the graphs so far.

    With ``hide``, that token may not see position ``hide``.
    """
    ids = prompt(30, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    cache = ArkvCache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        for step in range(2):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], -1)
            positions = mask.sum(-1, keepdim=True) - 1
            if hide is not None and step == 1:
                mask[:, hide] = 0
            out = model(
                ids[:, step : step + 1], attention_mask=mask, position_ids=positions,
                past_key_values=cache,
            )  # fmt: skip
    masks = [site.mask is not None for sites in model.arkv.backend.sites for site in sites]
    return out.logits, masks


def test_padding_is_known_while_decoding() -> None:
    """A decoded token's graph takes no mask, whose shape would grow, and sees no padding."""
    model = models.random_model("llama", num_hidden_layers=1)
    transform(model, ArkvConfig(budget=64, tiers=("native",)), compile="eager")
    found, masks = padded_step(model)
    assert masks == [True, False]
    with_mask, _ = padded_step(model, hide=0)  # hides padding of one row and a token of the other
    assert torch.allclose(found[0], with_mask[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], with_mask[1], rtol=1e-3)
