"""``transform(model, weights=...)``: what is quantized, what comes back, what is refused."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

import arkv_fx
from arkv_fx.compile.fast_linear import fast_products
from arkv_fx.errors import ConfigError, ExportError, TransformError
from arkv_fx.kernels.cpp import available
from arkv_fx.models import random_model
from arkv_fx.weights import quantizing
from arkv_fx.weights.stored import stored

pytest.importorskip("torchao")
from torchao.prototype.quantization.int4 import (
    PrototypeInt4WeightOnlyConfig,
)
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)

CONFIG = arkv_fx.ArkvConfig(budget=128, tiers=("native",))  # holds a text of 52 tokens whole
IDS = torch.arange(1, 41)[None] % 120
INT8 = Int8WeightOnlyConfig(set_inductor_config=False)
INT4 = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
compiles = pytest.mark.skipif(bool(available()), reason=available())


def transformed(model: Any, **options: Any) -> Any:
    return arkv_fx.transform(model, CONFIG, False, **{"compile": "eager", **options})


def kinds(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            name = type(module.weight).__name__
            found[name] = found.get(name, 0) + 1
    return found


@torch.no_grad()
def steps(model: Any) -> Tensor:
    """Logits of a prompt's last token and of twelve more, one by one."""
    cache = arkv_fx.ArkvCache(model)
    parts = (IDS, *IDS[:, :12].split(1, 1))
    return torch.cat(
        [model(x, past_key_values=cache, logits_to_keep=1).logits for x in parts], 1
    ).float()


@torch.no_grad()
def whole(model: Any) -> Tensor:
    """The same of the model itself, without a cache."""
    out: Tensor = model(torch.cat([IDS, IDS[:, :12]], 1), use_cache=False, logits_to_keep=13).logits
    return out.float()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_restore_gives_the_same_parameters_back(kind: str, tied: bool) -> None:
    model: Any = random_model("llama", tie_word_embeddings=tied)
    before = [(name, p, p.clone()) for name, p in model.named_parameters(remove_duplicate=False)]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    transformed(model, weights=kind)
    heads = {"int8": {"Int8Tensor": 15}, "int4": {"Int4OpaqueTensor": 14, "Int8Tensor": 1}}
    assert kinds(model) == heads[kind]
    assert type(model.lm_head.weight).__name__ == "Int8Tensor"
    embedding = next(p for name, p, _ in before if "embed_tokens" in name)
    assert model.model.embed_tokens.weight is embedding
    assert any("kept beside them" in note for note in model.arkv.report().notes)
    arkv_fx.restore(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == [name for name, _, _ in before]
    for name, parameter, value in before:
        assert after[name] is parameter and torch.equal(parameter, value)
    assert not any("extra_repr" in vars(module) for module in model.modules())


def test_without_the_originals_memory_goes_down_and_restore_warns() -> None:
    model: Any = random_model("llama")
    gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    transformed(model, weights="int8", keep_weights=False)
    gc.collect()
    assert gone() is None
    assert any("not kept" in note for note in model.arkv.report().notes)
    with pytest.warns(UserWarning, match="load the model again"):
        arkv_fx.restore(model)
    assert not hasattr(model, "arkv") and kinds(model) == {"Int8Tensor": 15}
    transformed(model)  # they are taken as they are
    arkv_fx.restore(model)


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    model: Any = random_model("llama")
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    transformed(model, weights="int8")
    assert second.weight is first.weight and type(first.weight).__name__ == "Int8Tensor"


def test_what_int4_cannot_hold_is_int8() -> None:
    model: Any = random_model("llama")
    layer = model.model.layers[0].mlp
    layer.down_proj = nn.Linear(100, layer.down_proj.out_features, bias=False)
    done = quantizing.quantize(model, "int4", keep=True)
    assert done.counts == {"int4": 13, "int8": 2}


def test_a_transform_that_fails_leaves_the_weights() -> None:
    model: Any = random_model("llama")
    weight = model.lm_head.weight
    with pytest.raises(ConfigError, match="compile"):
        transformed(model, weights="int8", compile="fast")
    assert model.lm_head.weight is weight and kinds(model) == {"Parameter": 15}


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights='int2'.*'int8', 'int4'"):
        transformed(random_model("llama"), weights="int2")
    with pytest.raises(ConfigError, match="none are quantized"):
        transformed(random_model("llama"), keep_weights=False)
    with pytest.raises(ConfigError, match="keep_weights"):
        transformed(random_model("llama"), weights="int8", keep_weights=1)
    model: Any = random_model("llama")
    with pytest.raises(TransformError, match=r"insert_cache: weights='int8'"):
        transformed(model, weights="int8", insert_cache=True)
    quantize_(model.model.layers[0], INT8)
    with pytest.raises(TransformError, match=r"q_proj\.weight is quantized already"):
        transformed(model, weights="int8")
    with pytest.raises(TransformError, match=r"insert_cache.*q_proj\.weight is quantized"):
        transformed(model, insert_cache=True)
    with pytest.raises(ExportError, match=r"q_proj\.weight is quantized by torchao"):
        arkv_fx.export(model, None, tmp_path / "out", config=CONFIG)
    with pytest.raises(TransformError, match=r"no torch\.nn\.Linear"):
        quantizing.quantize(nn.Embedding(4, 4), "int8", keep=True)
    with pytest.raises(TransformError, match="has no numbers yet"):
        quantizing.quantize(nn.Linear(32, 16, device="meta"), "int8", keep=True)
    with pytest.raises(TransformError, match="quantized already, or no float"):
        quantizing.quantize(nn.Linear(32, 16).double(), "int8", keep=True)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(TransformError, match=r"needs torchao.*arkv-fx\[weights\]"):
        transformed(random_model("llama"), weights="int8")


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        layer = nn.Linear(32, 16)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight, DeviceMesh("cpu", [0, 1])))
        assert isinstance(layer.weight, DTensor)
        with pytest.raises(TransformError, match="DTensor, as tensor parallelism has them"):
            quantizing.quantize(layer, "int8", keep=True)
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_pass_int8_weights_and_int4_ones_say_that_they_cannot() -> None:
    model = transformed(random_model("llama"), weights="int8")
    model(IDS).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.norm() > 0
    model = transformed(random_model("llama"), weights="int4")
    logits = model(IDS).logits
    with pytest.raises(TransformError, match=r"int4 weights.*no derivative"):
        logits.sum().backward()


USERS = {
    "int8": INT8,
    "int8 in groups": Int8WeightOnlyConfig(granularity=PerGroup(16), set_inductor_config=False),
    "int8, one scale": Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False),
    "int4": INT4,
    "int4 in bytes": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int8 products": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
}


F32, BF16 = torch.float32, torch.bfloat16


@compiles
@pytest.mark.parametrize(
    ("form", "dtype", "lowering"),
    [
        *((form, F32, "eager") for form in USERS if "products" not in form),
        ("int8", BF16, "eager"), ("int4", BF16, "eager"), ("int4", F32, "reference"),
        pytest.param("int8", F32, "inductor", marks=pytest.mark.slow), ("int4", F32, "inductor"),
    ],
)  # fmt: skip
def test_a_model_that_torchao_quantized_computes_what_it_did(
    form: str, dtype: torch.dtype, lowering: str
) -> None:
    """Compared with the model itself, as torchao runs it."""
    model: Any = random_model("llama", num_hidden_layers=1).to(dtype)
    quantize_(model, USERS[form])
    expected = whole(model)
    off = (steps(transformed(model, compile=lowering)) - expected).square().mean().sqrt()
    # 16 bits are rounded at other places.
    assert off < (2e-5 if dtype == F32 else 0.03) * expected.std()


@compiles
@torch.no_grad()
def test_steps_read_codes_where_they_lie_and_ask_nothing_of_their_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither torchao's product nor Dynamo's guards on its tensors are in a step; a weight that is
    replaced by one like it is read, by another kind refused."""
    model = transformed(random_model("llama", num_hidden_layers=1), weights="int4")
    other: Any = random_model("llama", seed=1, num_hidden_layers=1)
    quantizing.quantize(other, "int4", keep=False)
    steps(model)
    cache = arkv_fx.ArkvCache(model)
    model(IDS, past_key_values=cache)
    token = {"input_ids": IDS[:, :1], "past_key_values": cache}
    before = model(**token).logits
    layer, new = model.model.layers[0].mlp, other.model.layers[0].mlp
    kind = type(layer.down_proj.weight)
    with monkeypatch.context() as patch:
        for name in ("__tensor_flatten__", "__torch_function__", "__torch_dispatch__"):
            patch.setattr(kind, name, None)
        model(**token)
    layer.down_proj.weight = new.down_proj.weight
    assert not torch.equal(model(**token).logits, before)
    plain = nn.Linear(layer.down_proj.in_features, layer.down_proj.out_features, bias=False)
    quantize_(plain, PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False))
    layer.down_proj.weight = plain.weight
    with pytest.raises(TransformError, match="made otherwise"):
        model(**token)


class Three(nn.Module):
    """Layers of one input, the last with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(64, size, bias=size > 40) for size in (32, 16, 48))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2
        return tuple(part(x) for part in self.parts)


@compiles
@pytest.mark.parametrize("form", ["int8", "int8 in groups", "int4"])
@torch.no_grad()
def test_layers_of_one_input_are_one_call(form: str) -> None:
    model = Three().eval()
    quantize_(model, USERS[form])
    calls: list[int] = []

    def keep(graph: GraphModule, _: object) -> object:
        assert fast_products(graph) == 3
        few = [n for n in graph.graph.nodes if "linear_int" in str(n.target)]
        calls.extend(len(node.args[1]) for node in few)
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(1, 2, 64)
    found = torch.compile(model, backend=keep)(x)
    assert calls == [2, 1]
    torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", USERS)
def test_what_is_read_where_it_lies(form: str) -> None:
    layer = nn.Linear(64, 32, bias=False)
    quantize_(layer, USERS[form])
    held = stored(layer.weight)
    assert (held is None) == ("products" in form)
    if held is not None:
        assert held.kind == ("int4" if form == "int4" else "int8")
        groups = 2 if "int4" in form else 1
        assert held.groups == (4 if "groups" in form else groups)
