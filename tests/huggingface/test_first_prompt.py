"""The first long prompt calibrates, and is kept under the plan that follows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import arkv_fx
from arkv_fx import ArkvCache
from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig
from arkv_fx.huggingface import first_prompt
from arkv_fx.models import random_model

CONFIG = ArkvConfig(compression=8.0, context=300, window=8, round_to=1)
IDS = torch.randint(1, 128, (2, 300), generator=torch.Generator().manual_seed(0))
NEXT = torch.randint(1, 128, (2, 3), generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("as_it_comes")


def transformed(calibration: Any = None, arch: str = "llama", **changes: Any) -> Any:
    return arkv_fx.transform(random_model(arch, **changes), CONFIG, calibration, compile="eager")


@torch.no_grad()
def play(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[Any, ArkvCache]:
    """Logits of a prompt and of three tokens after it, and the cache."""
    cache = ArkvCache(model)
    out = [model(ids, attention_mask=mask, past_key_values=cache).logits]
    for step in range(3):
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        token = NEXT[: len(ids), step, None]
        out.append(model(token, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("arch, pad", [("llama", 0), ("llama", 20), ("gemma3", 0)])
def test_it_is_served_by_the_plan_that_it_gives(
    arch: str, pad: int, as_it_comes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :pad] = 0
    with caplog.at_level(logging.INFO, logger="arkv_fx"):
        model = transformed(arch=arch)
        ours, cache = play(model, IDS, mask)
    assert "calibrated on a prompt of 300 tokens" in caplog.text
    (file,) = as_it_comes.iterdir()
    found = Calibration.load(file)
    assert found == model.arkv.calibration and found.samples == (300,)
    by_hand = transformed(found, arch)
    expected, other = play(by_hand, IDS, mask)
    torch.testing.assert_close(ours, expected)
    assert {n: t.shape for n, t in cache.tensors().items()} == {
        n: t.shape for n, t in other.tensors().items()
    }
    for name in ("0.pos", "1.pos"):
        assert torch.equal(cache.tensors()[name], other.tensors()[name])
    again, _ = play(model, IDS, mask)  # by the ordinary graphs of the new plan
    torch.testing.assert_close(again, expected)
    assert model.arkv.report().nbytes == by_hand.arkv.report().nbytes
    assert transformed(arch=arch).arkv.calibration == found, "it is found by the next process"


def test_a_cache_that_lives_goes_on_under_its_plan() -> None:
    model = transformed()
    plain, _ = play(transformed(False), IDS[:, :200])
    cache = ArkvCache(model)
    with torch.no_grad():
        out = [model(IDS[:, :200], past_key_values=cache).logits]
        assert model.arkv.calibration is None, "too short to calibrate on"
        model(IDS)
        assert model.arkv.calibration is not None
        out += [model(NEXT[:, i, None], past_key_values=cache).logits for i in range(3)]
    torch.testing.assert_close(torch.cat(out, 1), plain)


def test_a_longer_prompt_tells_more(as_it_comes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What few tokens told is replaced once, in the model and in what is kept."""
    monkeypatch.setattr(first_prompt, "LEAST", 100)
    monkeypatch.setattr(first_prompt, "ENOUGH", 250)
    model, other = transformed(num_hidden_layers=1), IDS.flip(0)
    samples = []
    for ids in (IDS[:, :120], other[:, :120], IDS, other):
        with torch.no_grad():
            model(ids)
        (file,) = as_it_comes.iterdir()
        assert Calibration.load(file) == model.arkv.calibration
        samples.append(model.arkv.calibration.samples)
    assert samples == [(120,), (120,), (300,), (300,)]
    settled = model.arkv.calibration
    monkeypatch.setattr(first_prompt, "ENOUGH", 301)
    again = transformed(num_hidden_layers=1)
    assert again.arkv.calibration == settled
    with torch.no_grad():
        again(torch.cat([other, IDS[:, :1]], 1))
    assert again.arkv.calibration.samples == (301,), "nor is what was found the last word"


def test_the_plain_plan_stays_plain(as_it_comes: Path) -> None:
    model = transformed(False)
    play(model, IDS)
    assert model.arkv.calibration is None and not as_it_comes.exists()


def test_generate_calibrates() -> None:
    model = transformed()
    out = model.generate(IDS, max_new_tokens=4, do_sample=False)
    expected = transformed(model.arkv.calibration).generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, expected)


def test_what_cannot_be_calibrated_is_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> Any:
        raise first_prompt.CalibrationError("for once")

    monkeypatch.setattr(first_prompt, "calibrated", refuse)
    with caplog.at_level(logging.INFO, logger="arkv_fx"):
        ours, _ = play(transformed(), IDS)
    assert "is not calibrated on its first prompt: for once" in caplog.text
    torch.testing.assert_close(ours, play(transformed(False), IDS)[0])


@pytest.mark.parametrize("kind", ["padding", "blank", "repeated"])
def test_a_prompt_that_says_nothing_calibrates_nothing(kind: str, as_it_comes: Path) -> None:
    """A warm-up, or a batch that is mostly padding: what it told would be kept for good."""
    ids, mask = IDS[:1].clone(), torch.ones_like(IDS[:1])
    if kind == "padding":
        mask[:, :100] = 0
    elif kind == "blank":
        ids[:] = 0
    else:
        ids[:] = ids[:, :20].repeat(1, 15)
    model = transformed()
    play(model, ids, mask)
    assert model.arkv.calibration is None and not as_it_comes.exists()
    play(model, IDS)
    assert model.arkv.calibration is not None


def test_a_prompt_that_fails_leaves_it_to_the_next() -> None:
    model = transformed()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        play(model, IDS)
    handle.remove()
    play(model, IDS)
    assert model.arkv.calibration is not None


@torch.no_grad()
def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model = transformed()
        first, _ = play(model, IDS)
        again, _ = play(model, IDS)
    assert model.arkv.calibration is not None
    torch.testing.assert_close(first, again, rtol=0.05, atol=0.05)


def test_a_saved_cache_goes_on_under_the_plan_that_it_began_with(tmp_path: Path) -> None:
    """Whatever the model was calibrated on since, here or where it is loaded."""
    path, model = tmp_path / "a.safetensors", transformed()
    cache = ArkvCache(model)
    with torch.no_grad():
        model(IDS[:, :200], past_key_values=cache)  # too short to calibrate
        cache.save(path)
        expected = model(NEXT[:, :1], past_key_values=cache).logits
        play(model, IDS)
        assert model.arkv.calibration is not None
        for other in (model, transformed(False), transformed()):
            again = ArkvCache.load(path, other)
            found = other(NEXT[:, :1], past_key_values=again).logits
            torch.testing.assert_close(found, expected)
        again.save(path)
        ArkvCache.load(path, other)
