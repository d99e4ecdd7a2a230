"""The tier map says what the cache holds, and its page says it to whoever reads it."""

from __future__ import annotations

import base64
import copy
import json
import re
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

import arkv_fx
from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.pages.tier_page import tier_page
from arkv_fx.evaluation.pages.token_texts import pieces
from arkv_fx.evaluation.series import Series
from arkv_fx.evaluation.tier_map import Recorder, TierMap, code_of, record, score_of
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.models import random_model
from arkv_fx.zoo.configs import tiny_config

Steps = list[list[int]]


class Snapshots(StoppingCriteria):
    """The cache's own tensors after each step, copied."""

    def __init__(self, cache: ArkvCache) -> None:
        self.cache, self.found = cache, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        held = {name: x.clone() for name, x in self.cache.tensors().items()}
        self.found.append((self.cache.seen, held))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run(arch: str, tokens: int = 90, new: int = 6, **options: Any) -> Any:
    model = random_model(arch, vocab_size=256)
    config = arkv_fx.ArkvConfig(context=96, window=8, **options)
    arkv_fx.transform(model, config, False, compile="eager")
    cache = ArkvCache(model)
    recorder, snapshots = Recorder(cache), Snapshots(cache)
    ids = torch.randint(1, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    model.generate(
        ids, past_key_values=cache, max_new_tokens=new, do_sample=False, eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([recorder, snapshots]),
    )  # fmt: skip
    return recorder.found, snapshots.found, cache


def states_by_hand(pos: Tensor, plan: Any, tokens: int) -> list[list[str]]:
    """The role of each token in each head, slot by slot. pos: [Hkv, slots]."""
    out = []
    for head in pos.tolist():
        roles = ["evicted"] * tokens
        for slot, position in enumerate(head):
            first = plan.ring + plan.tiers[0].slots
            role = "window" if slot < plan.ring else "original" if slot < first else "quantized"
            if position >= 0:
                roles[position] = role
        if plan.sliding:
            for position in range(tokens):
                if position <= tokens - plan.sliding:
                    roles[position] = "outside"
        out.append(roles)
    return out


def check(found: TierMap, snapshots: Any, cache: ArkvCache) -> set[str]:
    """Every head of every layer after every step; the roles that were met."""
    met: set[str] = set()
    assert found.lengths == [tokens for tokens, _ in snapshots]
    for step, (tokens, tensors) in enumerate(snapshots):
        for layer, state in cache.session.layers.items():
            heads = states_by_hand(tensors[f"{layer}.pos"][0], state.plan, tokens)
            told = found.heads(step, layer)
            assert told.shape == (tokens, len(found.states))
            for position in range(tokens):
                roles = [roles[position] for roles in heads]
                met.update(roles)
                expected = [roles.count(state.role) for state in found.states]
                assert told[position].tolist() == expected, (step, layer, position)
    return met


EVIL = "</script><script>alert(1)</script><!--&amp;" * 2


@pytest.fixture(scope="module")
def llama() -> Any:
    """As many tokens as EVIL has bytes, of which three are generated."""
    return run("llama", tokens=len(EVIL) - 3, new=3, budget=24, oq_ratio=0.5)


def test_the_map_is_the_cache_after_every_step(llama: Any) -> None:
    found, snapshots, cache = llama
    assert check(found, snapshots, cache) == {"window", "original", "quantized", "evicted"}
    assert found.lengths == [len(EVIL) - 3, len(EVIL) - 2, len(EVIL) - 1]
    assert [state.format for state in found.states] == ["float32", "k8v4", "k4v3", ""]


def test_of_layers_that_slide() -> None:
    found, snapshots, cache = run("gemma3", budget=24, tiers=("int8", "int4"))
    assert any(state.plan.sliding for state in cache.session.layers.values())
    assert "outside" in check(found, snapshots, cache)


def test_scores_are_those_that_rank(llama: Any) -> None:
    found, _, cache = llama
    for layer, state in cache.session.layers.items():
        told = found.score(len(found.lengths) - 1, layer)
        held = state.view()
        age = (held.seen - held.pos).clamp(min=0).float()
        rank = held.plan.policy().precision(held.stats, age, held.pos >= 0)[0]
        for position in range(found.lengths[-1]):
            there = rank[held.pos[0] == position]
            expected = there.mean().item() if len(there) else 0.0
            assert told[position] == pytest.approx(expected, rel=0.1, abs=2**-40)


def test_a_layer_that_is_not_rewritten_is_kept_whole(llama: Any) -> None:
    cache = copy.deepcopy(llama[2])
    recorder = Recorder(cache)
    plain = type("Plain", (), {"tensors": [torch.zeros(1, 2, cache.seen, 16)] * 2})()
    cache.session.plain[1] = plain
    del cache.session.layers[1]
    recorder.record()
    assert recorder.found is not None
    whole = [state.role for state in recorder.found.states].index("whole")
    assert (recorder.found.heads(0, 1)[:, whole] == 2).all()
    assert (recorder.found.heads(0, 0)[:, whole] == 0).all()


def test_one_sequence_at_a_time() -> None:
    model = random_model("llama", vocab_size=256)
    arkv_fx.transform(model, arkv_fx.ArkvConfig(budget=40, window=8), False, compile="eager")
    with pytest.raises(EvaluationError, match="one sequence"):
        record(model, ArkvCache(model), torch.ones(2, 50, dtype=torch.long), 2)


def test_a_model_without_attention_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("mamba")).eval()
    arkv_fx.transform(model, arkv_fx.ArkvConfig(budget=40, window=8), False, compile="eager")
    with pytest.raises(EvaluationError, match="nothing to show"):
        record(model, ArkvCache(model), torch.ones(1, 50, dtype=torch.long), 2)


STEPS = st.lists(st.lists(st.integers(-(10**6), 10**6), max_size=6), min_size=1, max_size=5)


def unpacked(text: str, steps: int) -> Steps:
    """As the page's script reads it."""
    numbers, value, scale = [], 0, 1
    for byte in base64.b64decode(text):
        value, scale = value + (byte & 127) * scale, scale * 128
        if byte < 128:
            numbers.append(value)
            value, scale = 0, 1
    out, now, rest = [], {}, iter(numbers)
    for _ in range(steps):
        position = -1
        for _ in range(next(rest)):
            position += next(rest) + 1
            zigzag = next(rest)
            change = -(zigzag + 1) // 2 if zigzag % 2 else zigzag // 2
            now[position] = now.get(position, 0) + change
        out.append(dict(now))
    assert next(rest, None) is None
    return out  # type: ignore[return-value]


@given(STEPS)
def test_only_changes_are_kept_and_nothing_is_lost(steps: Steps) -> None:
    grown = [
        step + [0] * (max(map(len, steps[: i + 1])) - len(step)) for i, step in enumerate(steps)
    ]
    series = Series()
    for numbers in grown:
        series.add(np.array(numbers, np.int64))
    read = unpacked(series.packed(), len(grown))
    for index, numbers in enumerate(grown):
        assert series.at(index).tolist() == numbers
        assert [read[index].get(i, 0) for i in range(len(numbers))] == numbers  # type: ignore[attr-defined]


@given(st.floats(2**-40, 2**40), st.booleans())
def test_scores_are_kept_to_nine_percent(score: float, negative: bool) -> None:
    value = -score if negative else score
    assert score_of(code_of(np.array([value])))[0] == pytest.approx(value, rel=0.095)
    assert score_of(code_of(np.array([0.0, np.nan])))[:].tolist() == [0, 0]


@given(st.text(max_size=30))
def test_pieces_are_the_text(text: str) -> None:
    tokenizer = tiny_model.tokenizer()
    ids = tokenizer(text).input_ids
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)


def test_pieces_of_bytes_that_are_no_characters() -> None:
    tokenizer = tiny_model.tokenizer()
    ids = tokenizer("ab€").input_ids
    assert pieces(tokenizer, ids) == ["a", "b", "€", "", ""]
    assert len(pieces(tokenizer, [ids[2]] * 20 + ids)) == 20 + len(ids)


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_the_map_and_escapes_the_text(llama: Any) -> None:
    tokenizer = tiny_model.tokenizer()
    ids = tokenizer(EVIL).input_ids
    found, _, _ = llama
    page = tier_page(found, tokenizer, ids, len(ids) - 3, [f"said {EVIL}"])
    assert page.count("<script") == page.count("</script>") == 2 and EVIL not in page
    data = data_of(page)
    assert "".join(data["tokens"]) == EVIL
    for entry, layer in zip(data["layers"], found.layers, strict=True):
        for step, now in enumerate(unpacked(entry["mixes"], len(found.lengths))):
            told = [data["mixes"][now.get(i, 0)] for i in range(found.lengths[step])]  # type: ignore[attr-defined]
            assert told == found.heads(step, layer.layer).tolist()


def test_a_long_run_is_a_small_file() -> None:
    """2000 tokens, 64 steps and 30 layers, of which more changes than in a real one."""
    chance = np.random.default_rng(0)
    total = 0
    for series in (Series(), Series()):
        numbers = chance.integers(0, 200, 2000)
        for _step in range(64):
            numbers = np.append(numbers, 1)
            moved = chance.random(len(numbers)) < 0.25
            numbers = np.where(moved, chance.integers(0, 200, len(numbers)), numbers)
            series.add(numbers.astype(np.int64))
        total += len(series.packed())
    assert 30 * total < 10 * 2**20
