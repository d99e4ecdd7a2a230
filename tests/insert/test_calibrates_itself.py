"""The first long prompt calibrates an inserted cache, too."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models_outside.nano_gpt import GPT, GPTConfig
from models_outside.sample import random_weights

import arkv_fx
from arkv_fx import ArkvCache, ArkvConfig
from arkv_fx.errors import TransformError

CONFIG = ArkvConfig(compression=4.0, context=300, window=8, sinks=2, round_to=1)
IDS = torch.randint(0, 64, (1, 300), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("as_it_comes")


def inserted(calibration: Any = None, compile: str = "eager") -> Any:
    torch.manual_seed(0)  # biases
    model = random_weights(GPT(GPTConfig(block_size=512)))
    return arkv_fx.transform(model, CONFIG, calibration, compile=compile, insert_cache=True)


def play(model: Any, cache: ArkvCache, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """Logits of a prompt and of two tokens after it."""
    tokens = [ids, ids[:, :1], ids[:, 1:2]]
    return [model(each, cache=cache)[0][:, -1] for each in tokens]


def slots(model: Any) -> list[int]:
    return [row["slots"] for row in model.arkv.report().rows]


@pytest.mark.parametrize("compile", ["eager", "inductor"])
def test_it_is_served_by_the_plan_that_it_gives(
    compile: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = inserted(compile=compile)
    with caplog.at_level(logging.INFO, logger="arkv_fx"):
        ours = play(model, ArkvCache(model))
    assert "GPT is calibrated on a prompt of 300 tokens" in caplog.text
    found = model.arkv.calibration
    by_hand = inserted(found, compile)
    torch.testing.assert_close(ours, play(by_hand, ArkvCache(by_hand)))
    again = inserted(compile=compile)
    assert again.arkv.calibration == found, "it is found by the next process"
    assert slots(again) == slots(model) != slots(inserted(False))


def test_a_cache_that_lives_goes_on_under_its_plan() -> None:
    model, plain = inserted(), inserted(False)
    cache, expected = ArkvCache(model), play(plain, ArkvCache(plain), IDS[:, :200])
    first = model(IDS[:, :200], cache=cache)[0][:, -1]  # too short to tell anything
    assert model.arkv.calibration is None
    play(model, ArkvCache(model))
    assert model.arkv.calibration is not None
    later = [model(IDS[:, i : i + 1], cache=cache)[0][:, -1] for i in range(2)]
    torch.testing.assert_close([first, *later], expected)


def test_threads_on_a_cold_model() -> None:
    """Whoever comes first captures and calibrates; all are answered as if they were alone."""
    alone = inserted(False)
    expected = play(alone, ArkvCache(alone), IDS[:, :200])
    model = inserted(False)
    with ThreadPoolExecutor(4) as pool:
        turns = [pool.submit(play, model, ArkvCache(model), IDS[:, :200]) for _ in range(4)]
        for turn in turns:
            torch.testing.assert_close(turn.result(), expected)


@pytest.mark.parametrize("change", ["hook", "module"])
def test_what_was_captured_is_not_used_for_another_model(change: str) -> None:
    model = inserted(False)
    play(model, ArkvCache(model), IDS[:, :50])
    if change == "hook":
        model.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    else:
        model.lm_head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    with pytest.raises(TransformError, match="not those that it had when its cache was inserted"):
        play(model, ArkvCache(model), IDS[:, :50])
    arkv_fx.restore(model)
    arkv_fx.transform(model, CONFIG, False, compile="eager", insert_cache=True)
    whole = model(IDS[:, :50])[0][:, -1]
    torch.testing.assert_close(model(IDS[:, :50], cache=ArkvCache(model))[0][:, -1], whole)
