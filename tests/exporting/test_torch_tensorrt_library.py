"""What Torch-TensorRT itself makes of the graphs, up to the loading of the engine.

Without a GPU: the questions for a device are answered, network and plan are made, and what would
load the plan keeps it instead. .ci/torch_tensorrt makes the environment and runs this.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import arkv_fx
from arkv_fx.exporting import torch_tensorrt_target
from arkv_fx.exporting.programs import Programs, make_programs
from arkv_fx.models import random_model

if find_spec("torch_tensorrt") is None:
    pytest.skip("torch_tensorrt is not installed: .ci/torch_tensorrt", allow_module_level=True)

FAMILIES = ["llama", "qwen3", "gemma3", "gpt2", "qwen3_moe", "mixtral"]
GRAPHS = ["decode", "prefill"]
DEVICE = {
    "get_device_capability": (8, 9),
    "current_device": 0,
    "device_count": 1,
    "get_device_name": "none",
    "get_device_properties": SimpleNamespace(
        major=8, minor=9, name="none", total_memory=24 << 30, multi_processor_count=100
    ),
    "mem_get_info": (20 << 30, 24 << 30),
    "synchronize": None,
    "set_device": None,
    "empty_cache": None,
}


class Built(Exception):
    """A plan, which is as far as a machine without a GPU gets."""


class Runtime:
    """Stands for TensorRT's, which asks for a driver."""

    def __init__(self, log: Any) -> None: ...

    def deserialize_cuda_engine(self, plan: Any) -> None:
        raise Built(plan.nbytes)


def programs(arch: str, *tiers: str) -> Programs:
    model = random_model(arch, num_hidden_layers=2)  # type: ignore[arg-type]
    config = arkv_fx.ArkvConfig(budget=64, window=8)
    config = config.replace(tiers=tiers) if tiers else config
    return make_programs(model, config, None, 1)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library. What a test captures it must capture before: torch asks the device, too."""
    for name, answer in DEVICE.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    found = torch_tensorrt_target._compiler()
    from torch_tensorrt.dynamo.conversion import _TRTInterpreter

    monkeypatch.setattr(_TRTInterpreter.trt, "Runtime", Runtime)
    yield found


def size(compiler: Any, made: Programs, graph: str) -> int:
    """Bytes of the plan of a graph that is one engine."""
    with pytest.raises(Built) as built:
        torch_tensorrt_target.compile_graph(compiler, made.engine(graph), made.span(128, {}))
    return int(str(built.value))


DEFAULT: dict[str, Programs] = {}


@pytest.fixture
def default(request: pytest.FixtureRequest) -> Programs:
    arch = request.getfixturevalue("arch")
    if arch not in DEFAULT:
        DEFAULT[arch] = programs(arch)
    return DEFAULT[arch]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("arch", FAMILIES)
def test_each_graph_is_one_engine(default: Programs, compiler: Any, arch: str, graph: str) -> None:
    """With the default formats; the prompt's for any length."""
    weights = sum(p.numel() * p.element_size() for p in default.model.parameters())
    assert weights < size(compiler, default, graph) < weights + 64 * 2**20  # kernels are in it


@pytest.fixture
def others(request: pytest.FixtureRequest) -> Programs:
    return programs("llama", *request.getfixturevalue("tiers"))


@pytest.mark.parametrize("tiers", [("int8", "int4"), ("native",)], ids="-".join)
def test_other_formats(others: Programs, compiler: Any, tiers: tuple[str, ...]) -> None:
    assert all(size(compiler, others, graph) > 10_000 for graph in GRAPHS)


@pytest.fixture
def llama() -> Programs:
    return programs("llama", "int8")


def test_an_operator_that_it_lacks_is_found(
    llama: Programs, compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: one put back stays outside, and more than one engine is not taken."""
    monkeypatch.delitem(torch_tensorrt_target.PLAIN, torch.ops.aten.exp2.default)
    with pytest.raises(AssertionError, match="not fully supported"):
        torch_tensorrt_target.compile_graph(compiler, llama.engine("decode"), (0, 0))
