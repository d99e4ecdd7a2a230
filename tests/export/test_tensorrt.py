"""Engines are built without a GPU; none is run, only what they are made of is seen."""

from __future__ import annotations

import json
from pathlib import Path

import engine_cases as cases
import pytest

import arkv_fx
from arkv_fx.errors import ExportError, UnknownOptionError
from arkv_fx.export import tensorrt

pytest.importorskip("tensorrt_rtx")
CONFIG = arkv_fx.ArkvConfig(budget=24, window=4, sinks=2, tiers=("int8", "int4"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = cases.random_model("llama", num_hidden_layers=2)
    out = tmp_path_factory.mktemp("engines") / "e"
    return arkv_fx.export(
        model, None, out, "tensorrt", config=CONFIG, capabilities=["SM80", "SM120"]
    )


def test_each_capability_gets_an_engine(folder: Path) -> None:
    sidecar = json.loads((folder / "arkv.json").read_text())
    assert [engine["capability"] for engine in sidecar["engines"]] == ["SM80", "SM120"]
    for engine in sidecar["engines"]:
        assert (folder / engine["file"]).stat().st_size == engine["bytes"] > 10_000
        assert 0 < sum(engine["kernels"].values()) < 200


def test_an_engine_takes_the_planned_state(folder: Path) -> None:
    """Codes go in as codes: there is no input that is not in the sidecar, nor of another dtype."""
    sidecar = json.loads((folder / "arkv.json").read_text())
    planned = {t["input"]: t["dtype"] for group in sidecar["groups"] for t in group["tensors"]}
    assert "int8" in planned.values()
    for engine in sidecar["engines"]:
        found = {n: d for n, d in engine["inputs"].items() if n.startswith("past_key_values")}
        assert found == planned


def test_a_graph_that_is_none_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "decode.onnx"
    broken.write_bytes((folder / "decode.onnx").read_bytes()[:2000])
    with pytest.raises(ExportError, match=r"decode\.onnx for SM89: "):
        tensorrt.build(broken, tmp_path / "e", "SM89")
    assert not (tmp_path / "e").exists()


def test_a_build_has_a_time_limit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="TensorRT took more than"):
        tensorrt.build(folder / "decode.onnx", tmp_path / "e", "SM89", 0.2)


@pytest.mark.parametrize(
    "capabilities, tiers, error, said",
    [
        (["SM86", "SM89"], ("fp8",), ExportError, "SM86 have no fp8"),
        (["SM90"], ("int8",), UnknownOptionError, "'SM90'"),
    ],
)
def test_what_cannot_be_built_leaves_nothing(
    capabilities: list[str], tiers: tuple[str, ...], error: type[Exception], said: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = cases.random_model("llama", num_hidden_layers=1)
    config = CONFIG.replace(tiers=tiers)
    with pytest.raises(error, match=said):
        arkv_fx.export(
            model, None, tmp_path / "e", "tensorrt", config=config, capabilities=capabilities
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tier", ["int8", "int4", "fp8"])
def test_architectures_and_formats(arch: str, tier: str, tmp_path: Path) -> None:
    model = cases.random_model(arch, num_hidden_layers=2)
    names = ["SM89", "SM120"] if tier == "fp8" else ["SM80", "SM86", "SM89", "SM120"]
    config = CONFIG.replace(tiers=(tier,))
    out = arkv_fx.export(model, None, tmp_path / "e", "tensorrt", config=config, capabilities=names)
    assert len(list(out.glob("*.engine"))) == len(names)
