"""Linear layers in the form for their rows: which are taken, and that answers stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import arkv_fx
from arkv_fx.compile import fast_linear, linear_forms, pieces, uncompiled
from arkv_fx.compile.fast_linear import fast_products
from arkv_fx.kernels.cpp import available
from arkv_fx.models import random_model

reason = available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)
FEW = torch.ops.arkv_cpu.linear.default
MANY = torch.ops.arkv_cpu.linear_in_float32.default
CONFIG = arkv_fx.ArkvConfig(budget=40, window=4, sinks=2)
WHOLE = arkv_fx.ArkvConfig(budget=128, tiers=("native",))  # of a text of 102 tokens
IDS = torch.arange(1, 91)[None] % 120


def run(
    arch: str, dtype: torch.dtype, lowering: str, monkeypatch: pytest.MonkeyPatch,
    config: arkv_fx.ArkvConfig = CONFIG,
) -> tuple[Tensor, list[dict[object, int]]]:  # fmt: skip
    """Logits of a prompt and of twelve tokens, and how many products of which form a graph has."""
    counts: list[dict[object, int]] = []

    def noted(graph: GraphModule) -> int:
        done = fast_products(graph)
        targets = [node.target for node in graph.graph.nodes]
        plain = torch.nn.functional.linear
        counts.append({form: targets.count(form) for form in (FEW, MANY, plain)} | {"all": done})
        return done

    for user in (pieces, uncompiled):
        monkeypatch.setattr(user, "fast_products", noted)
    model = random_model(arch).to(dtype)
    before = [(p.data_ptr(), p.clone()) for p in model.parameters()]
    arkv_fx.transform(model, config, False, compile=lowering)
    cache = arkv_fx.ArkvCache(model)
    with torch.no_grad():
        found = [
            model(ids, past_key_values=cache, logits_to_keep=1).logits
            for ids in (IDS, *IDS[:, :12].split(1, 1))
        ]
    arkv_fx.restore(model)
    for (address, value), parameter in zip(before, model.parameters(), strict=True):
        assert parameter.data_ptr() == address and torch.equal(parameter, value)
    return torch.cat(found, 1).float(), counts


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("qwen3", torch.float16)],
)
def test_answers_stay(
    arch: str, dtype: torch.dtype, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under a small budget two roundings of 16 bits need not evict the same tokens.
    config = CONFIG if dtype == torch.float32 else WHOLE
    expected, none = run(arch, dtype, "reference", monkeypatch, config)
    assert not none
    found, counts = run(arch, dtype, lowering, monkeypatch, config)
    prompt, step = counts[0], counts[-1]
    # Queries, keys and values; what follows attention; gate and up; down: four calls for seven
    # layers, twice; and the logits. A prompt's are of its last token.
    assert step == {FEW: 9, MANY: 0, torch.nn.functional.linear: 0, "all": 15}
    wide = 0 if linear_forms.multiplied_by_torch(dtype) else 14
    assert prompt == {
        FEW: 1, MANY: wide, torch.nn.functional.linear: 14 - wide, "all": 1 + wide,
    }  # fmt: skip
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
        return
    with torch.no_grad():
        model = random_model(arch).to(dtype).float()  # the same weights, with nothing rounded since
        exact = model(torch.cat([IDS, IDS[:, :12]], 1), logits_to_keep=13).logits
    off, usual = ((x - exact).square().mean().sqrt() for x in (found, expected))
    assert off < 1.3 * usual + 1e-3 and off < 0.04 * exact.std()


@pytest.mark.parametrize("native", [True, False])
def test_many_rows_where_the_processor_lacks_instructions(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_forms, "multiplied_by_torch", lambda dtype: native)
    _, counts = run("llama", torch.bfloat16, "eager", monkeypatch)
    assert (counts[0][MANY], counts[0][torch.nn.functional.linear]) == ((0, 14), (14, 0))[
        not native
    ]


class Traced(nn.Module):
    """Three layers of one input, which ``change`` may write to behind the first, without a bias."""

    def __init__(self, change: Callable[[Tensor], object] = lambda x: None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, size, bias=size > 4) for size in (4, 5, 6))
        self.change = change

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2
        first = self.parts[0](x)
        self.change(x)
        return first, self.parts[1](x), self.parts[2](x)


def traced(model: nn.Module, x: Tensor) -> GraphModule:
    graphs: list[GraphModule] = []
    torch._dynamo.reset()

    def keep(graph: GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=keep)(x)
    return graphs[0]


def forms(graph: GraphModule) -> list[object]:
    return [len(node.args[1]) for node in graph.graph.nodes if node.target == FEW]


def inputs(graph: GraphModule, model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a graph's placeholders stand for: parameters by their names, else ``x``."""
    return [
        next((p for name, p in model.named_parameters() if _same(name, node.name)), x)
        for node in graph.graph.find_nodes(op="placeholder")
    ]


def _same(name: str, placeholder: str) -> bool:
    index, kind = name.split(".")[1:]
    return f"_{index}_" in placeholder and kind in placeholder


@torch.no_grad()
def test_layers_of_one_input_are_one_call() -> None:
    """Those with a bias apart from those without."""
    model, x = Traced().eval(), torch.randn(1, 2, 8)
    graph = traced(model, x)
    given = inputs(graph, model, x)
    assert fast_products(graph) == 3 and forms(graph) == [1, 2]
    torch.testing.assert_close(tuple(graph(*given)), model(x))


@torch.no_grad()
def test_autocast_gradients_and_many_rows_of_float32_stay_torchs() -> None:
    model, x = Traced().eval(), torch.randn(1, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast_products(traced(model, x)) == 0
    with torch.enable_grad():
        assert fast_products(traced(model, x)) == 0
    assert fast_products(traced(model, torch.randn(1, 40, 8))) == 0


@torch.no_grad()
def test_weights_of_other_dtypes_and_strides_stay_torchs() -> None:
    model = Traced().eval()
    model.parts[0].weight.data = torch.randn(8, 4).t()
    assert fast_products(traced(model, torch.randn(1, 1, 8))) == 2
    assert fast_products(traced(Traced().eval().double(), torch.randn(1, 1, 8).double())) == 0


@torch.no_grad()
def test_without_a_compiler_all_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_linear, "available", lambda: "no compiler")
    assert fast_products(traced(Traced().eval(), torch.randn(1, 1, 8))) == 0


@torch.no_grad()
def test_weights_are_read_where_they_lie() -> None:
    """What is changed in place later counts: nothing was packed or copied."""
    model = arkv_fx.transform(random_model("llama"), CONFIG, False, compile="inductor")
    first, again = (_second_step(model) for _ in range(2))
    assert torch.equal(first, again)
    model.lm_head.weight.mul_(2)
    torch.testing.assert_close(_second_step(model), 2 * first, rtol=1e-4, atol=1e-4)


def _second_step(model: nn.Module) -> Tensor:
    cache = arkv_fx.ArkvCache(model)
    model(IDS, past_key_values=cache, logits_to_keep=1)
    logits: Tensor = model(IDS[:, :1], past_key_values=cache).logits
    return logits


def _set(x: Tensor) -> None:
    x[..., 0] = 5


def _by_a_view(x: Tensor) -> None:
    x.view(-1).add_(1)


def _by_a_part(x: Tensor) -> None:
    first, _ = x.chunk(2, -1)
    first += 1


WRITES: list[Callable[[Tensor], object]] = [
    lambda x: x.add_(1),
    _set,
    _by_a_view,
    _by_a_part,
    lambda x: torch.add(x, 1, out=x),
    lambda x: nn.functional.relu(x, inplace=True),
    lambda x: nn.functional.relu(x, True),
    lambda x: torch.ops.aten.mul_.Tensor(x, x),
]


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_nothing_is_joined_across_a_write(write: Callable[[Tensor], object]) -> None:
    """Whatever its spelling, to whatever it writes: the second layer reads what is there then."""
    model, x = Traced(write).eval(), torch.randn(1, 2, 8)
    graph = traced(model, x)
    given = inputs(graph, model, x)
    assert fast_products(graph) == 3 and forms(graph) == [1, 2]
    torch.testing.assert_close(tuple(graph(*given)), model(x))


class WritesWeights(nn.Module):
    """Two layers, the second's weight changed between them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2
        first = self.parts[0](x)
        self.parts[1].weight.add_(1)
        return first, self.parts[1](x)


@torch.no_grad()
def test_a_weight_that_is_written_to_keeps_layers_apart() -> None:
    graph = traced(WritesWeights().eval(), torch.randn(1, 1, 8))
    assert fast_products(graph) == 2 and forms(graph) == [1, 1]


class Autocast(nn.Module):
    """A layer under autocast in the middle of a graph, and one outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            inner: Tensor = self.parts[0](x)
        last: Tensor = self.parts[1](inner.float())
        return last


@torch.no_grad()
def test_a_layer_under_autocast_in_the_graph_stays_torchs() -> None:
    graph = traced(Autocast().eval(), torch.randn(1, 1, 8))
    assert fast_products(graph) == 1
