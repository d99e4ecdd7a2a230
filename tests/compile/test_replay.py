"""Recorded decode steps: the same answers, in memory that the next sequence takes over.

The tape of ``tape.py`` is a CUDA graph for the CPU; ``test_cuda.py`` records real ones.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_outside import gpt_fast
from models_outside.sample import ROOMY, TOLERANCE, TOTAL, ids, random_weights
from tape import Tape, record_tape
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from arkv_fx import ArkvCache, ArkvConfig, models, restore, transform
from arkv_fx.compile import replay
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.compile.replay import RECORDERS, Recording, Replay
from arkv_fx.compile.replay_inputs import Kind, kinds, why_not
from arkv_fx.zoo.configs import tiny_model

SMALL = ArkvConfig(budget=48, window=8, sinks=2)
NEW = 30


@pytest.fixture(autouse=True)
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", record_tape)


def prompt(length: int = 60, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 128, (batch, length), generator=generator)


def recorded(model: PreTrainedModel, config: ArkvConfig = SMALL) -> list[Replay]:
    """Transform so that steps are recorded as torch runs them; the list fills as graphs come."""
    transform(model, config, compile="reduce-overhead")
    backend: ArkvBackend = model.arkv.backend
    backend.lowering = "reference"
    return backend.replays


def generate(model: PreTrainedModel, tokens: Tensor, **options: Any) -> list[list[int]]:
    with torch.no_grad():
        out: Tensor = model.generate(tokens, max_new_tokens=NEW, do_sample=False, **options)
    return out[:, tokens.shape[1] :].tolist()


def padded() -> dict[str, Tensor]:
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = 0
    return {"tokens": prompt(batch=2), "attention_mask": mask}


CALLS: dict[str, dict[str, Any]] = {
    "one": {"tokens": prompt()},
    "batch": {"tokens": prompt(batch=3)},
    "padding": padded(),
    "beams": {"tokens": prompt(), "num_beams": 3},
}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    model = models.random_model("llama")
    transform(model, SMALL, compile="reference")
    return {name: generate(model, **call) for name, call in CALLS.items()}


def test_answers_are_those_of_steps_that_run(expected: dict[str, list[list[int]]]) -> None:
    model = models.random_model("llama")
    replays = recorded(model)
    for _ in range(2):
        for name, call in CALLS.items():
            assert generate(model, **call) == expected[name], name
    assert not any(r.reason for r in replays)
    # All decoded tokens but the first of each batch size: a prompt gives the first token.
    assert sum(r.replayed for r in replays) == 2 * len(CALLS) * (NEW - 1) - len({1, 2, 3})


@pytest.mark.parametrize("broken", ["inputs", "state"])
def test_what_is_not_copied_is_missed(
    broken: str, expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls: a recording that keeps its first token, or another sequence's state."""
    model = models.random_model("llama")
    recorded(model)
    if broken == "state":
        generate(model, prompt(50))
        gc.collect()
        monkeypatch.setattr(torch, "_foreach_copy_", lambda *_: None)
    else:
        held = replay._held
        monkeypatch.setattr(
            replay, "_held", lambda kind, x: x.clone() if kind is Kind.GIVEN else held(kind, x)
        )
        monkeypatch.setattr(Recording, "take", lambda *_: None)
    assert generate(model, **CALLS["one"]) != expected["one"]


def test_a_sequence_moves_into_the_memory_of_one_that_ended() -> None:
    model = models.random_model("llama")
    replays = recorded(model)
    places = set()
    for _ in range(3):
        cache = ArkvCache(model)
        decode(model, cache, 4)
        places.add(cache.session.layers[0]["pos"].data_ptr())
        del cache
        gc.collect()
    assert len(places) == 1
    (replay,) = replays
    assert len(replay.recordings) == 1


def decode(model: PreTrainedModel, cache: ArkvCache, steps: int, length: int = 60) -> Tensor:
    """Logits of a prompt's last token and of greedily decoded ones, positions left to the model."""
    with torch.no_grad():
        out = [model(prompt(length), past_key_values=cache).logits[:, -1:]]
        for _ in range(steps):
            out.append(model(out[-1].argmax(-1), past_key_values=cache).logits)
    return torch.cat(out, 1)


def test_sequences_in_turn_have_recordings_of_their_own() -> None:
    model = models.random_model("llama")
    transform(model, SMALL, compile="reference")
    alone = [decode(model, ArkvCache(model), NEW, length) for length in (60, 40)]
    restore(model)
    replays = recorded(model)
    caches = [ArkvCache(model) for _ in alone]
    found = [[decode(model, c, 0, n)] for c, n in zip(caches, (60, 40), strict=True)]
    for _ in range(NEW):
        for cache, out in zip(caches, found, strict=True):
            with torch.no_grad():
                out.append(model(out[-1].argmax(-1), past_key_values=cache).logits)
    for out, want in zip(found, alone, strict=True):
        torch.testing.assert_close(torch.cat(out, 1), want)
    (replay,) = replays
    # The position, which the model counts in Python here, is no part of a recording.
    assert (replay.replayed, replay.reason) == (2 * NEW - 1, "")


def test_a_copied_sequence_goes_on_by_itself() -> None:
    model = models.random_model("llama")
    recorded(model)
    cache = ArkvCache(model)
    before = decode(model, cache, 5)[:, -1:]
    twin = copy.deepcopy(cache)
    outs = []
    for own in (cache, twin):
        out = before
        with torch.no_grad():
            for _ in range(6):
                out = model(out.argmax(-1), past_key_values=own).logits
        outs.append(out)
    torch.testing.assert_close(*outs)


def test_moved_weights_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved() -> tuple[Tensor, list[Replay]]:
        model = models.random_model("llama")
        replays = recorded(model)
        cache = ArkvCache(model)
        out = decode(model, cache, 3)[:, -1:]
        model.lm_head.weight.data = model.lm_head.weight.data * 2
        with torch.no_grad():
            return model(out.argmax(-1), past_key_values=cache).logits, replays

    found, replays = moved()
    assert (replays[0].replayed, replays[0].reason) == (3, "")
    monkeypatch.delitem(RECORDERS, "cpu")
    torch.testing.assert_close(found, moved()[0])


def test_a_mask_that_grows_is_named() -> None:
    """Bloom's biases are made of the mask, which has a column for every token."""
    model = tiny_model("bloom")
    transform(model, SMALL, compile="reference")
    want = generate(model, **CALLS["padding"])
    restore(model)
    recorded(model)
    with pytest.warns(RuntimeWarning, match="not replayed.* changes from step to step"):
        assert generate(model, **CALLS["padding"]) == want
    assert "not replayed" in str(model.arkv.report())


def test_a_cache_that_is_written_in_place_is_named() -> None:
    """Linear attention has its own state, which the graph writes to."""
    model = tiny_model("qwen3_next")
    transform(model, SMALL, compile="reference")
    want = generate(model, prompt())
    restore(model)
    recorded(model)
    assert generate(model, prompt()) == want
    assert "it writes to its input" in str(model.arkv.report())


@pytest.mark.parametrize("way", ["view", "setitem", "out", "none"])
def test_writes_are_seen_through_views(way: str) -> None:
    def call(x: Tensor, y: Tensor) -> Tensor:
        if way == "view":
            x.transpose(0, 1)[0].add_(y)
        elif way == "setitem":
            x[1] = y
        elif way == "out":
            torch.add(y, 1, out=x[0])
        else:
            x = x.clone().add_(y)
        return x.sum()

    reasons = []

    def backend(graph: GraphModule, inputs: Any) -> Any:
        reasons.append(why_not(graph, kinds(graph, ())))
        return graph.forward

    torch.compile(call, backend=backend)(torch.ones(3, 3), torch.ones(3))
    assert [bool(r) for r in reasons] == [way != "none"]


def test_a_step_that_looks_at_numbers_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.random_model("llama")
    replays = recorded(model)
    decode(model, ArkvCache(model), 1)
    compiled = replays[0].compiled
    replays[0].compiled = lambda *xs: (int(xs[1].sum()), compiled(*xs))[1]
    with pytest.warns(RuntimeWarning, match="recording failed: operation not permitted"):
        decode(model, ArkvCache(model), 3)
    assert replays[0].replayed == 0


def test_static_buffers() -> None:
    model = random_weights(gpt_fast.Transformer(gpt_fast.ModelArgs()))
    model.setup_caches(1, 64)
    tokens = ids(1)
    positions = torch.arange(TOTAL)
    with torch.no_grad():
        full = model(tokens, positions)
        backend = ArkvBackend(ROOMY, compile="reduce-overhead")
        backend.lowering = "reference"
        compiled = torch.compile(model, backend=backend)
        found = [compiled(tokens[:, :10].contiguous(), positions[:10])]
        for i in range(10, TOTAL):
            found.append(compiled(tokens[:, i : i + 1].contiguous(), positions[i : i + 1]))
    assert float((torch.cat(found, 1) - full).abs().max() / full.abs().max()) <= TOLERANCE
    (replay,) = backend.replays
    assert (replay.replayed, replay.reason) == (TOTAL - 11, "")


def called_again(call: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """Compiled code runs past the tape: here a launch is the same call, on the same inputs."""
    out = torch.empty(1, 1, 97)

    def launch() -> None:
        found = call()
        out.copy_(found[0] if isinstance(found, tuple) else found)

    return (out,), launch


def test_an_inserted_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", called_again)
    model = Plain().eval()
    tokens = prompt(20) % 97
    with torch.no_grad():
        full = model(tokens)
        transform(model, ROOMY, compile="reduce-overhead", insert_cache=True)
        cache = ArkvCache(model)
        found = [model(tokens[:, :8], cache=cache)]
        found += [model(tokens[:, i : i + 1], cache=cache) for i in range(8, 20)]
    torch.testing.assert_close(torch.cat(found, 1), full, rtol=1e-4, atol=1e-4)
    used = [p.replay for p in model.arkv.programs.values() if p.replay is not None]
    assert [(r.replayed, r.reason) for r in used] == [(11, "")]
    assert Kind.WEIGHT in used[0].kinds


class Plain(nn.Module):
    """One attention without a cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.position = nn.Embedding(97, 32), nn.Embedding(64, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 97)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return found


def test_without_graphs_steps_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RECORDERS, "cpu")
    model = models.random_model("llama")
    replays = recorded(model)
    generate(model, prompt())
    assert replays[0].replayed == 0
    assert "there are no graphs to record on cpu" in str(model.arkv.report())


def test_the_mode_of_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = []

    def counted(call: Callable[[], Any], device: torch.device) -> Any:
        recordings.append(device)
        return called_again(call, device)

    monkeypatch.setitem(RECORDERS, "cpu", counted)
    model = random_weights(gpt_fast.Transformer(gpt_fast.ModelArgs()))
    model.setup_caches(1, 64)
    tokens, positions = ids(1), torch.arange(TOTAL)
    with torch.no_grad():
        full = model(tokens, positions)
        compiled = torch.compile(model, backend="arkv", mode="reduce-overhead")
        compiled(tokens[:, :10].contiguous(), positions[:10])
        for i in range(10, TOTAL):
            last = compiled(tokens[:, i : i + 1].contiguous(), positions[i : i + 1])
    assert len(recordings) == 1
    assert float((last - full[:, -1:]).abs().max() / full.abs().max()) <= 0.05


def test_the_tape_runs_nothing_while_it_records() -> None:
    x = torch.ones(3)
    with Tape() as tape:
        y = x.add_(1).mul(2)
    assert x.tolist() == [1, 1, 1] and y.isnan().all()
    tape.launch()
    tape.launch()
    assert x.tolist() == [3, 3, 3] and y.tolist() == [6, 6, 6]
