"""Several threads generate at once, with one model or with several, first calls included."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from arkv_fx import ArkvCache, ArkvConfig, transform
from arkv_fx.errors import CacheError
from arkv_fx.huggingface import attention_interface
from arkv_fx.models import random_model

CONFIG = ArkvConfig(budget=200, tiers=("native",), window=8)
SETTINGS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def at_once(jobs: list[Callable[[], Tensor]]) -> list[Tensor]:
    """What the jobs answer, each in a thread; their first error if there is one."""
    answers: dict[int, Tensor] = {}
    errors: list[Exception] = []
    start = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        start.wait()
        try:
            answers[number] = jobs[number]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [answers[number] for number in range(len(jobs))]


@pytest.fixture
def masks_back() -> Iterator[None]:
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    yield
    type(ALL_MASK_ATTENTION_FUNCTIONS).register("sdpa", before)


@pytest.mark.parametrize(
    ("attentions", "older"),
    [
        (["sdpa", "flex_attention"], False),
        pytest.param(["sdpa", "sdpa"], True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("masks_back")
def test_threads_get_what_each_alone_would(
    attentions: list[str], older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models, prompts of several lengths, a padded batch, an untransformed model beside them:
    cold at first, then warm."""
    if older:  # as with the releases before those that leave masks out by themselves
        monkeypatch.setattr(attention_interface, "LEAVES_OUT", False)
    plain, *models = (random_model("llama", num_hidden_layers=1) for _ in range(3))
    prompts = [torch.randint(1, 128, (1, 20 + 7 * n)) for n in range(3)]
    padded = torch.randint(1, 128, (2, 24))
    seen = torch.ones_like(padded)
    seen[1, :5] = 0
    calls: list[dict[str, Any]] = [{"inputs": x} for x in prompts]
    calls.append({"inputs": padded, "attention_mask": seen})
    want = [plain.generate(**call, **SETTINGS) for call in calls]
    other = torch.compile(plain, backend="eager")
    for model, attention in zip(models, attentions, strict=True):
        model.config._attn_implementation = attention
        transform(model, CONFIG, compile="eager")

    def job(number: int) -> Callable[[], Tensor]:
        model = models[number % 2]
        return lambda: model.generate(**calls[number], **SETTINGS)

    def untransformed() -> Tensor:
        with torch.no_grad():
            return torch.cat([other(x).logits[:, -1].argmax(-1, keepdim=True) for x in prompts])

    with torch.no_grad():
        plainly = torch.cat([plain(x).logits[:, -1].argmax(-1, keepdim=True) for x in prompts])
    for _ in range(2):
        *got, beside = at_once([*(job(n) for n in range(len(calls))), untransformed])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(beside, plainly)
    assert [model.config._attn_implementation for model in models] == attentions
    for model in models:
        assert model.arkv.report().fused == 1
    if attention_interface.LEAVES_OUT:
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask


def test_one_cache_is_stepped_by_one_thread_at_a_time() -> None:
    model = transform(random_model("llama", num_hidden_layers=1), CONFIG, compile="eager")
    cache = ArkvCache(model)
    inside, done = threading.Event(), threading.Event()

    def waits(*_: Any) -> None:
        inside.set()
        assert done.wait(60)

    with torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.long), past_key_values=cache)
    end_step = cache.end_step
    cache.end_step = lambda: (waits(), end_step())[1]  # type: ignore[method-assign]

    def step() -> Tensor:
        with torch.no_grad():
            return model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache).logits

    first = threading.Thread(target=step)
    first.start()
    assert inside.wait(60)
    with pytest.raises(CacheError, match=r"another thread is in a step.*ArkvCache\(model\)"):
        step()
    done.set()
    first.join()
    assert step().isfinite().all() and cache.get_seq_length() == 11
