"""A whole real model in ONNX Runtime: the transformed model's tokens, and thousands of steps."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from torch import Tensor

import arkv_fx
from arkv_fx import ArkvConfig, models
from arkv_fx.runtime import OnnxSession

pytestmark = pytest.mark.slow
TOKENS = 64


def config(fmt: str) -> ArkvConfig:
    return ArkvConfig(budget=256, tiers=(fmt,))


@lru_cache
def text() -> Tensor:
    _, tokenizer = models.load("smollm2")
    whole = files("arkv_fx.texts").joinpath("persuasion.txt").read_text()
    return tokenizer(whole, return_tensors="pt", verbose=False).input_ids[:, :3000]


@lru_cache
def session(fmt: str) -> OnnxSession:
    model, tokenizer = models.load("smollm2")
    out = Path(mkdtemp()) / fmt
    arkv_fx.export(model, None, out, config=config(fmt), tokenizer=tokenizer)
    return OnnxSession(out, threads=1)


@pytest.mark.parametrize("fmt", ["int8", "native"])
def test_greedy_tokens_from_short_and_long_prompts(fmt: str) -> None:
    model, _ = models.load("smollm2")
    arkv_fx.transform(model, config(fmt), compile="reference")
    for length in (500, 3000):
        ids = text()[:, :length]
        expected = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=TOKENS,
            max_new_tokens=TOKENS, do_sample=False,
        )[0, length:]  # fmt: skip
        end = model.generation_config.eos_token_id  # never chosen by min_new_tokens
        found = session(fmt).generate(ids.numpy(), TOKENS, stop=())
        assert end not in found
        assert found[0].tolist() == expected.tolist(), length


def test_thousands_of_steps_stay_finite_and_within_the_budget() -> None:
    runner = session("int8")
    ids, seen = text()[:, :500].numpy(), 500
    logits = runner.prefill(ids)
    sizes = {name: x.nbytes for name, x in runner.state().items()}
    for step in range(2000):
        logits = runner.step(logits.argmax(-1))
        assert np.isfinite(logits).all(), step
    seen += 2000
    state = runner.state()
    assert {name: x.nbytes for name, x in state.items()} == sizes
    assert sum(sizes.values()) == runner.nbytes
    positions = state["past_key_values.0.pos"]
    assert positions.shape[-1] == 256
    assert positions.max() == seen - 1
    assert (np.sort(positions)[..., 1:] != np.sort(positions)[..., :-1]).all(), (
        "a token is held twice"
    )
    for name, x in state.items():
        if x.dtype in (np.float32, np.float16):
            assert np.isfinite(x).all(), name


def test_the_weights_are_stored_once() -> None:
    parameters = sum(p.numel() * p.element_size() for p in models.load("smollm2")[0].parameters())
    folder = session("int8").sidecar.folder
    files_ = [p for p in folder.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files_) < 1.2 * parameters
