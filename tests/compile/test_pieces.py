"""Graphs compiled in pieces: how many compilations there are, and when one may serve again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import symbolic_trace
from transformers import PreTrainedModel

import arkv_fx
from arkv_fx import ArkvCache, ArkvConfig
from arkv_fx.compile import pieces
from arkv_fx.models import random_model

CONFIG = ArkvConfig(budget=40, window=4, sinks=1, tiers=("int8", "int4"))
IDS = torch.randint(1, 128, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The pieces that were compiled since, by what they are."""
    made: list[str] = []
    original = pieces.compile_graph

    def count(graph: torch.fx.GraphModule, inputs: list[object]) -> pieces.Compiled:
        attends = any(n.target == pieces.ATTEND for n in graph.graph.nodes)
        made.append("attention" if attends else "between")
        return original(graph, inputs)

    monkeypatch.setattr(pieces, "compile_graph", count)
    pieces.compiled_pieces.clear()
    torch._dynamo.reset()
    yield made
    pieces.compiled_pieces.clear()


def decode(model: PreTrainedModel, steps: int = 2) -> Tensor:
    """Logits of the last of some steps after a prompt."""
    cache = ArkvCache(model)
    with torch.no_grad():
        out = model(IDS, past_key_values=cache)
        for step in range(steps):
            out = model(IDS[:, step : step + 1], past_key_values=cache)
    logits: Tensor = out.logits
    return logits


def test_layers_of_one_shape_are_compiled_once(compiled: list[str]) -> None:
    model = random_model("llama", num_hidden_layers=5)
    expected = decode(arkv_fx.transform(model, CONFIG, compile="reference"))  # type: ignore[arg-type]
    arkv_fx.restore(model)
    assert compiled == []
    arkv_fx.transform(model, CONFIG)
    found = decode(model)
    # Before the first attention, between two, after the last; of the prompt and of a token.
    assert compiled.count("between") == 6
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_same_slots_need_no_compilation(compiled: list[str]) -> None:
    model = random_model("llama", num_hidden_layers=2)
    arkv_fx.transform(model, CONFIG)
    decode(model)
    first = list(compiled)
    arkv_fx.restore(model)
    torch._dynamo.reset()
    compiled.clear()
    arkv_fx.transform(model, CONFIG)
    decode(model)
    # The prompt's three pieces have sizes that are symbols of their graph, as a decoded token's
    # first one has, which knows the position; the others serve again.
    assert compiled == ["between"] * 4
    assert len(first) > 4


def test_prompts_of_other_lengths_go_through_the_same_pieces(compiled: list[str]) -> None:
    """Sizes are symbols as in Dynamo's graph, not those of the first prompt."""
    model, full = (random_model("llama", num_hidden_layers=2) for _ in range(2))
    arkv_fx.transform(model, CONFIG.replace(budget=80, tiers=("native",)))
    counts = []
    with torch.no_grad():
        for length in (24, 40, 31):
            ids = torch.randint(1, 128, (1, length))
            cache = ArkvCache(model)
            first = model(ids, past_key_values=cache).logits
            torch.testing.assert_close(first, full(ids).logits, rtol=1e-4, atol=1e-4)
            found = model(ids[:, :1], past_key_values=cache).logits
            expected = full(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            counts.append(len(compiled))
    assert counts[0] == counts[1] == counts[2]


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 1:] * self.factor


def test_the_cache_on_disk_is_not_that_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    number = time.time()  # a constant that no cache knows

    def generated() -> int:
        torch._dynamo.reset()
        before = counters["inductor"]["fxgraph_cache_miss"]
        run = torch.compile(lambda x: x * number, backend=pieces.compile_graph)
        assert torch.equal(run(torch.ones(2)), torch.full((2,), number))
        return counters["inductor"]["fxgraph_cache_miss"] - before

    assert [generated(), generated()] == [1, 0]
    monkeypatch.setattr(pieces, "_sources", lambda: "another")
    assert [generated(), generated()] == [1, 0]


def test_pieces_are_told_apart() -> None:
    """A negative control of the key: everything that changes the code changes it."""

    def key(factor: float, x: Tensor) -> object:
        return pieces.piece_key(symbolic_trace(Scaled(factor)), (x,))

    x = torch.zeros(2, 4)
    assert key(2.0, x) == key(2.0, torch.ones(2, 4))
    different = [
        key(2.0, x),
        key(3.0, x),
        key(2.0, x.double()),
        key(2.0, torch.zeros(2, 5)),
        key(2.0, torch.zeros(4, 2).T),
        key(2.0, x.clone().requires_grad_()),
    ]
    assert len(set(different)) == len(different)
