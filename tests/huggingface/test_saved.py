"""Caches in files: a prefix read once, and gone on from in other processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Lfm2Config, Lfm2ForCausalLM

from arkv_fx import ArkvCache, ArkvConfig, restore, transform
from arkv_fx.errors import CacheError, ConfigError
from arkv_fx.formats import FORMATS
from arkv_fx.huggingface.saved import KEY
from arkv_fx.models import random_model

SMALL = ArkvConfig(budget=32, window=8)
PREFIX = torch.randint(1, 128, (2, 60), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(PREFIX)
MASK[1, :7] = 0
ROTATED = {"rope_type": "default", "rope_theta": 5e5}
LATER = torch.randint(1, 128, (2, 5), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def begun(model: Any) -> ArkvCache:
    cache = ArkvCache(model)
    model(PREFIX, attention_mask=MASK, past_key_values=cache)
    return cache


@torch.no_grad()
def goes_on(model: Any, cache: ArkvCache) -> torch.Tensor:
    mask, out = MASK, []
    for token in LATER.split(1, 1):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        out.append(model(token, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.fixture(scope="module")
def model() -> Any:
    return transform(random_model("llama"), SMALL, compile="eager")


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    begun(model).save(tmp_path / "prefix.safetensors")
    return tmp_path / "prefix.safetensors"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_it_goes_on_as_if_it_had_stayed(name: str, tmp_path: Path) -> None:
    config = ArkvConfig(budget=32, window=8, tiers=(name,))
    model = transform(
        random_model("llama", num_hidden_layers=1, head_dim=32), config, compile="eager"
    )
    cache = begun(model)
    cache.save(tmp_path / "x")
    want = goes_on(model, cache)
    twin = ArkvCache.load(tmp_path / "x", model)
    assert twin.get_seq_length() == PREFIX.shape[1] and twin.batch_size == 2
    assert torch.equal(goes_on(model, twin), want)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


ELSEWHERE = """
import sys, torch
from arkv_fx import ArkvCache, ArkvConfig, transform
from arkv_fx.models import random_model

model = transform(random_model("llama"), ArkvConfig(budget=32, window=8), compile="eager")
cache = ArkvCache.load(sys.argv[1], model)
prompt = torch.load(sys.argv[2], weights_only=True)
text = model.generate(**prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)
print(text.tolist())
"""


def test_another_process_goes_on(model: Any, saved: Path, tmp_path: Path) -> None:
    ids = torch.cat([PREFIX, LATER], 1)
    prompt = {"input_ids": ids, "attention_mask": torch.cat([MASK, torch.ones_like(LATER)], 1)}
    want = model.generate(**prompt, past_key_values=begun(model), max_new_tokens=6, do_sample=False)
    torch.save(prompt, tmp_path / "prompt")
    run = [sys.executable, "-c", ELSEWHERE, str(saved), str(tmp_path / "prompt")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == want.tolist()


def test_another_model_or_configuration_is_refused(model: Any, saved: Path) -> None:
    others = [
        (random_model("llama", seed=3), SMALL, "another model or other weights"),
        (random_model("llama").to(torch.bfloat16), SMALL, "another dtype"),
        (random_model("llama"), ArkvConfig(budget=32, window=9), "another configuration.*window"),
        (random_model("llama", rope_parameters=ROTATED), SMALL, "a model of another config"),
    ]
    for other, config, said in others:
        transform(other, config, compile="eager")
        with pytest.raises(CacheError, match=said):
            ArkvCache.load(saved, other)
    with pytest.raises(CacheError, match="not transformed"):
        ArkvCache.load(saved, random_model("llama"))
    for path in (3, None):
        with pytest.raises(ConfigError, match="the path of a file that save wrote"):
            ArkvCache.load(path, random_model("llama"))  # type: ignore[arg-type]


def test_damaged_files_are_refused(model: Any, saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as file:
        said = json.loads(file.metadata()[KEY])
    whole = saved.read_bytes()

    def refused(match: str, path: Path = saved) -> None:
        with pytest.raises(CacheError, match=match):
            ArkvCache.load(path, model)

    def rewrite(held: dict[str, torch.Tensor], text: str) -> None:
        save_file(held, saved, metadata={KEY: text})

    refused("no such file", tmp_path / "none")
    for cut in (0, 4, 200, len(whole) - 1):
        saved.write_bytes(whole[:cut])
        refused("damaged")
    save_file(tensors, saved)
    refused("ArkvCache.save")
    for text in ("", "[]", "{}", json.dumps({**said, "plans": {"0": "x"}})):
        rewrite(tensors, text)
        refused("damaged")
    rewrite(tensors, json.dumps({**said, "version": 99}))
    refused("version 99")
    rewrite(tensors, json.dumps({**said, "tokens": 3}))
    refused("3 tokens")
    rewrite({**tensors, "0.pos": tensors["0.pos"][..., 1:].contiguous()}, json.dumps(said))
    refused("0: pos")
    rewrite({n: t for n, t in tensors.items() if n != "1.pos"}, json.dumps(said))
    refused("damaged")
    rewrite({**tensors, "more": torch.ones(1)}, json.dumps(said))
    refused("more")
    rewrite(tensors, json.dumps(said))
    ArkvCache.load(saved, model)


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "block_ff_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    kinds = {"layer_types": ["conv", "full_attention"]}
    hybrid = Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, **kinds)).eval()
    cache = begun(transform(hybrid, SMALL, compile="eager"))
    with pytest.raises(CacheError, match="recurrent states"):
        cache.save(tmp_path / "x")
    plain = transform(random_model("llama", num_hidden_layers=1), SMALL, compile="eager")
    cache = begun(plain)
    with pytest.raises(CacheError, match="cannot be written"):
        cache.save(tmp_path / "no" / "such" / "folder")
    restore(plain)
    assert not list(tmp_path.iterdir())
