"""Engines are built without a GPU; none is run, only what they are made of is seen."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import engine_cases as cases
import numpy as np
import pytest
import torch

import arkv_fx
from arkv_fx import models
from arkv_fx.errors import ExportError, UnknownOptionError
from arkv_fx.exporting import onnx_target, tensorrt_target
from arkv_fx.exporting.programs import MOST_SORTED, make_programs
from arkv_fx.runtime import OnnxSession

pytest.importorskip("tensorrt_rtx")
CONFIG = arkv_fx.ArkvConfig(budget=512, window=4, sinks=2, tiers=("int8", "int4"))
ARCHITECTURES = ["llama", "qwen3", "gemma3"]
EVERY = ["SM80", "SM86", "SM89", "SM120"]


def engines(
    arch: str, out: Path, tiers: tuple[str, ...], capabilities: list[str], **options: Any
) -> dict[str, Any]:
    """The sidecar of a model of two layers with engines."""
    # Heads so wide that keys are larger than logits and probabilities.
    model = cases.random_model(arch, num_hidden_layers=2, head_dim=64)
    config = CONFIG.replace(tiers=tiers)
    arkv_fx.export(
        model, None, out, "tensorrt", config=config, capabilities=capabilities, **options
    )
    sidecar: dict[str, Any] = json.loads((out / "arkv.json").read_text())
    for engine in sidecar["engines"]:
        assert (out / engine["file"]).stat().st_size == engine["bytes"] > 10_000
        assert 0 < sum(engine["kernels"].values()) < 300
    return sidecar


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "e"
    engines("llama", out, ("int8", "int4"), EVERY, longest=1000)
    return out


def test_each_capability_gets_engines_of_both_graphs(folder: Path) -> None:
    found = json.loads((folder / "arkv.json").read_text())["engines"]
    assert [(e["graph"], e["capability"]) for e in found] == [
        (graph, capability) for graph in ("prefill", "decode") for capability in EVERY
    ]
    assert {e["longest"] for e in found if e["graph"] == "prefill"} == {1000}
    # What engines are built from beside the graphs of target onnx is not kept.
    graphs = {p.name for p in folder.glob("*.onnx")}
    assert graphs == {"prefill.onnx", "decode.onnx"}


def test_an_engine_takes_the_planned_state(folder: Path) -> None:
    """Codes go in as codes: no input that is not in the sidecar, nor of another dtype than it is or
    holds the bytes of.
    """
    sidecar = json.loads((folder / "arkv.json").read_text())
    tensors = [t for group in sidecar["groups"] for t in group["tensors"]]
    planned = {t["input"]: t["bytes_of"] or t["dtype"] for t in tensors}
    assert "int8" in planned.values()
    for engine in sidecar["engines"]:
        found = {n: d for n, d in engine["inputs"].items() if n.startswith("past_key_values")}
        assert found == (planned if engine["graph"] == "decode" else {})


def test_onnx_runtime_runs_the_graphs_beside_the_engines(folder: Path) -> None:
    session = OnnxSession(folder, threads=1)
    assert session.generate(np.arange(1, 21)[None], 4).shape == (1, 4)


def native(model: Any, config: arkv_fx.ArkvConfig, out: Path, names: list[str]) -> int:
    """Write graphs with products of matrices and native dtypes; the prompt's least length."""
    programs = make_programs(model, config, None, 1)
    graphs = {graph.name: graph for graph in programs.graphs if graph.name in names}
    nothing: dict[str, Any] = {"graphs": {}, "versions": {"arkv-fx": "0"}}
    onnx_target.write_graphs(out, graphs, nothing, lambda message: None)
    return programs.least


def tier_numbers(sidecar: dict[str, Any]) -> int:
    """Numbers in the keys of the smallest tier of a layer with full attention."""
    groups = [group for group in sidecar["groups"] if not group["sliding"]]
    (ring,) = {
        (t["shape"][-3], t["shape"][-1])
        for group in groups
        for t in group["tensors"]
        if t["input"].endswith(".key")
    }
    slots = min(t["slots"] for group in groups for t in group["tiers"])
    return slots * math.prod(ring)


def test_no_kernel_writes_a_dequantized_cache(folder: Path, tmp_path: Path) -> None:
    """Between kernels goes nothing as large as the keys or values of one tier of one layer."""
    sidecar = json.loads((folder / "arkv.json").read_text())
    for engine in sidecar["engines"]:
        if engine["graph"] == "decode":
            assert 0 < engine["largest"] < tier_numbers(sidecar) / 2
    # Negative control: products of matrices, as in ONNX Runtime's graph, want their operands.
    model = cases.random_model("llama", num_hidden_layers=2, head_dim=64)
    native(model, CONFIG, tmp_path, ["decode"])
    other = tensorrt_target.build(tmp_path / "decode.onnx", tmp_path / "e", "SM89")
    assert other["largest"] >= tier_numbers(sidecar)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES[1:])
def test_other_architectures(arch: str, tmp_path: Path) -> None:
    sidecar = engines(arch, tmp_path / "e", ("int8", "int4"), EVERY, graphs=["decode"])
    assert [e["capability"] for e in sidecar["engines"]] == EVERY


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fp8(arch: str, tmp_path: Path) -> None:
    sidecar = engines(arch, tmp_path / "e", ("fp8",), ["SM89", "SM120"], graphs=["decode"])
    assert all("float8_e4m3fn" in e["inputs"].values() for e in sidecar["engines"])
    assert all(e["largest"] < tier_numbers(sidecar) / 2 for e in sidecar["engines"])


def test_the_default_tiers(tmp_path: Path) -> None:
    """Three-bit values too are taken apart inside the kernels that sum over them."""
    tiers = arkv_fx.ArkvConfig().tiers
    sidecar = engines("llama", tmp_path / "e", tiers, ["SM80", "SM120"], graphs=["decode"])
    assert all(e["largest"] < tier_numbers(sidecar) / 2 for e in sidecar["engines"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("llama", torch.bfloat16), ("llama", torch.float16), ("qwen3_moe", torch.bfloat16)],
)
def test_half_precision(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.random_model(arch, num_hidden_layers=1).to(dtype)  # type: ignore[arg-type]
    # More than TensorRT sorts at once: each token goes to two experts.
    longest = 4096 if arch == "qwen3_moe" else 60
    options: dict[str, Any] = {"capabilities": ["SM89"], "longest": longest}
    arkv_fx.export(model, None, tmp_path / "e", "tensorrt", config=CONFIG, **options)
    for engine in json.loads((tmp_path / "e" / "arkv.json").read_text())["engines"]:
        assert sum(engine["kernels"].values()) > 0
        keys = {d for n, d in engine["inputs"].items() if n.endswith(".key")}
        wanted = {str(dtype).removeprefix("torch.")}
        assert keys == (wanted if engine["graph"] == "decode" else set())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiers", "capabilities"), [(("int8", "int4"), EVERY), (("fp8",), ["SM89", "SM120"])]
)
def test_a_whole_model(tiers: tuple[str, ...], capabilities: list[str], tmp_path: Path) -> None:
    """Two minutes for a decode engine, and little beside the weights in it."""
    model, _ = models.load("smollm2")
    out, config = tmp_path / "e", CONFIG.replace(tiers=tiers, oq_ratio=0.5)
    arkv_fx.export(
        model, None, out, "tensorrt", config=config, capabilities=capabilities, graphs=["decode"]
    )
    sidecar = json.loads((out / "arkv.json").read_text())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert [e["capability"] for e in sidecar["engines"]] == capabilities
    for engine in sidecar["engines"]:
        print(engine["file"], engine["seconds"], engine["bytes"] / weights, engine["largest"])
        assert engine["seconds"] <= 120
        assert weights < engine["bytes"] <= 1.2 * weights
        # Scores of all layers are updated together, and are nearly as many.
        assert 0 < engine["largest"] < tier_numbers(sidecar)
    least = native(model, config, tmp_path, ["prefill", "decode"])
    source, span = tmp_path / "prefill.onnx", (least, 2048)
    prompt = tensorrt_target.build(source, tmp_path / "engine", "SM89", span=span)
    print("prefill", prompt["seconds"], prompt["bytes"] / weights)
    assert weights < prompt["bytes"] <= 1.2 * weights
    # Negative control, as above.
    other = tensorrt_target.build(tmp_path / "decode.onnx", tmp_path / "engine", "SM89")
    assert other["largest"] >= tier_numbers(sidecar)


def test_a_graph_that_is_none_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "decode.onnx"
    broken.write_bytes((folder / "decode.onnx").read_bytes()[:2000])
    with pytest.raises(ExportError, match=r"decode\.onnx for SM89: "):
        tensorrt_target.build(broken, tmp_path / "e", "SM89")
    assert not (tmp_path / "e").exists()


def test_a_build_has_a_time_limit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="TensorRT took more than"):
        tensorrt_target.build(folder / "decode.onnx", tmp_path / "e", "SM89", 0.01)


@pytest.mark.parametrize(
    "change, options, error, said",
    [
        ({"tiers": ("fp8",)}, {"capabilities": ["SM86", "SM89"]}, ExportError, "SM86 have no fp8"),
        ({"tiers": ("int8", "fp8")}, {}, ExportError, "SM86 have no fp8"),
        ({}, {"capabilities": ["SM90"]}, UnknownOptionError, "'SM90'"),
        ({}, {"graphs": ["encode"]}, UnknownOptionError, "'encode'"),
        ({}, {"longest": "7"}, ExportError, "longest='7': must be a whole number"),
        ({}, {"longest": True}, ExportError, "longest=True: must be a whole number"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_model_is_captured(
    change: dict[str, Any], options: dict[str, Any], error: type[Exception], said: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    package = importlib.import_module("arkv_fx.exporting")
    monkeypatch.setattr(package, "make_programs", lambda *_: pytest.fail("captured"))
    refuses(change, options, error, said, tmp_path)


def test_what_no_package_would_help_comes_before_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_target, "find_spec", lambda name: None)
    refuses({"tiers": ("fp8",)}, {}, ExportError, "SM86 have no fp8", tmp_path)
    refuses({}, {}, ExportError, "needs onnx, onnxscript, tensorrt_rtx: pip install", tmp_path)


def test_what_cannot_be_built_leaves_nothing(tmp_path: Path) -> None:
    refuses({}, {"longest": 3}, ExportError, "takes 5 or more", tmp_path)


def test_the_longest_prompt_is_what_budget_and_model_speak_of() -> None:
    def span(longest: int | None, positions: int, **options: Any) -> tuple[int, int]:
        config = arkv_fx.ArkvConfig(window=16, **options)
        model = models.random_model("llama", num_hidden_layers=1, max_position_embeddings=positions)
        return make_programs(model, config, None, 1).span(longest, config.to_dict())

    assert span(None, 2**17) == (17, 4096)
    assert span(None, 2**17, budget=9000) == (17, 9000)
    assert span(None, 512) == (17, 512)
    assert span(600, 512) == (17, 600)  # rotations go on


@pytest.mark.slow
@pytest.mark.parametrize("compression", [4.0, 8.0])
def test_budgets_for_long_contexts(compression: float, tmp_path: Path) -> None:
    """Tiers of more slots than TensorRT chooses tokens for at once, and constants not folded."""
    model = models.random_model("llama", num_hidden_layers=1, max_position_embeddings=2**17)
    config = arkv_fx.ArkvConfig(context=2**17, compression=compression)
    out, options = tmp_path / "e", {"capabilities": ["SM89"]}
    arkv_fx.export(model, None, out, "tensorrt", config=config, **options)
    sidecar = json.loads((out / "arkv.json").read_text())
    tiers = [tier["slots"] for group in sidecar["groups"] for tier in group["tiers"]]
    assert max(tiers) > 2 * MOST_SORTED
    assert [e.get("longest") for e in sidecar["engines"]] == [2**17, None]


def test_layers_that_all_slide(tmp_path: Path) -> None:
    """The default plan leaves some of their tiers without slots: no tensors, nothing to refuse."""
    model = models.random_model("mistral", num_hidden_layers=1, sliding_window=64)
    arkv_fx.export(model, None, tmp_path / "e", "tensorrt", capabilities=["SM89"])
    sidecar = json.loads((tmp_path / "e" / "arkv.json").read_text())
    assert {group["sliding"] for group in sidecar["groups"]} == {64}
    assert all(tier["slots"] for group in sidecar["groups"] for tier in group["tiers"])
    shapes = [t["shape"] for group in sidecar["groups"] for t in group["tensors"]]
    assert shapes and all(all(shape) for shape in shapes)


def refuses(
    change: dict[str, Any], options: dict[str, Any], error: type[Exception], said: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = cases.random_model("llama", num_hidden_layers=1)
    config = CONFIG.replace(**{"tiers": ("int8",), **change})
    with pytest.raises(error, match=said):
        arkv_fx.export(model, None, tmp_path / "e", "tensorrt", config=config, **options)
    assert not any(tmp_path.iterdir())
