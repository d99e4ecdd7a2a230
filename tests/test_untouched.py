"""Models that the passes have nothing to do with are handed on; the report says why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from arkv_fx import ArkvConfig, restore, transform
from arkv_fx.compile import backend
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.errors import TransformError
from arkv_fx.report import Report

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=4)).eval()
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, vocab_size=97, max_position_embeddings=64)).eval()
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 7:] = 0
    return model, {"input_ids": torch.arange(22).view(2, 11), "attention_mask": mask}


MODELS = pytest.mark.parametrize("make", [vit, bert])
Make = Callable[[], tuple[nn.Module, dict[str, Tensor]]]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's sums round otherwise: where nothing matches it has no business."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a graph without a cache was compiled")

    monkeypatch.setattr(backend, "compile_graph", refuse)
    monkeypatch.setattr(backend, "compile_pieces", refuse)


@MODELS
@torch.no_grad()
def test_a_transformed_encoder_answers_to_the_byte(make: Make) -> None:
    model, inputs = make()
    before = model(**inputs).last_hidden_state
    transform(model)
    assert torch.equal(model(**inputs).last_hidden_state, before)
    report = model.arkv.report()
    assert len(report.rows) == 2 and report.fused == 0 and report.nbytes == 0
    assert all("no cache" in row["reason"] for row in report.rows), report
    restore(model)
    assert torch.equal(model(**inputs).last_hidden_state, before)


@MODELS
@torch.no_grad()
def test_torch_compile_hands_the_graph_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make()
    ours = ArkvBackend(ArkvConfig())
    seen: list[tuple[GraphModule, str, Any]] = []

    def watch(graph: GraphModule, example_inputs: Any) -> Any:
        code = graph.code
        compiled = ours(graph, example_inputs)
        seen.append((graph, code, compiled))
        return compiled

    out = torch.compile(model, backend=watch)(**inputs).last_hidden_state
    assert torch.equal(out, model(**inputs).last_hidden_state)
    assert seen
    for graph, code, _ in seen:
        assert graph.code == code, "Dynamo's graph was changed"
    assert Report.of(ours.sites, ArkvConfig()).fused == 0


class Operators(TorchDispatchMode):
    """Notes every operator that runs and the memory of the tensors that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        memory = [a.data_ptr() for a in args if isinstance(a, Tensor) and a is not None]
        self.ran.append((str(func), memory[:1]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_the_graph_runs_as_it_is_and_nothing_is_copied() -> None:
    taken: list[tuple[GraphModule, Any]] = []

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    def watch(graph: GraphModule, example_inputs: Any) -> Any:
        taken.append((graph, ArkvBackend(ArkvConfig())(graph, example_inputs)))
        return taken[-1][1]

    x = torch.randn(1, 2, 6, 8)
    torch._dynamo.reset()
    torch.compile(function, backend=watch)(x)
    ((graph, call),) = taken
    with Operators() as ours:
        call(x)
    with Operators() as plain:
        graph(x)
    assert plain.ran and ours.ran == plain.ran
    assert ours.ran[0][1] == [x.data_ptr()]


@MODELS
def test_no_cache_is_inserted_where_tokens_look_ahead(make: Make) -> None:
    model, inputs = make()
    before = model(**inputs).last_hidden_state
    says = "no causal self-attention"
    if "cache" in inspect.signature(model.forward).parameters:  # Bert's since transformers 5.24
        says = "argument `cache` of its own"
    with pytest.raises(TransformError, match=says):
        transform(model, insert_cache=True, sample=tuple(inputs.values()))
    assert torch.equal(model(**inputs).last_hidden_state, before) and not hasattr(model, "arkv")
