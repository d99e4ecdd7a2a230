"""``arkv generate --engine`` takes the engines where there are any for this GPU, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from typer.testing import CliRunner

from arkv_fx.cli import app
from arkv_fx.runtime import cuda_device

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("cuda.bindings.runtime")
from driver_recorder import Driver, add_engines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("command")
    model = tiny_model.save(out / "model")
    command = ["export", str(model), "--out", str(out / "e"), "--budget", "64"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (out / "e" / "prompt.txt").write_text("It is a truth universally acknowledged")
    add_engines(out / "e", "SM89", 50)
    return out / "e"


def generate(folder: Path, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    prompt, out = folder / "prompt.txt", folder / "row.json"
    out.unlink(missing_ok=True)
    files = ["--prompt-file", str(prompt), "--json", str(out)]
    done = CliRunner().invoke(app, ["generate", *files, "--max-new-tokens", "6", *options])
    assert done.exit_code == code, done.output
    return json.loads(out.read_text()) if code == 0 else {}, " ".join(done.output.split())


@pytest.fixture
def driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver(folder)
    monkeypatch.setattr(cuda_device, "import_module", found.packages.__getitem__)
    return found


def test_engines_for_this_gpu_are_taken(folder: Path, driver: Driver) -> None:
    by, said = generate(folder, "--engine", str(folder))
    assert by["runtime"] == "tensorrt" and driver.calls["cudaGraphLaunch"] == 3
    assert "tensorrt runs it: engines for SM89, the GPU is SM89" in said
    other, said = generate(folder, "--engine", str(folder), "--runtime", "onnx")
    assert other["runtime"] == "onnx" and "runs it" not in said
    assert (other["text"], other["bytes"]) == (by["text"], by["bytes"])
    driver.calls.clear()
    forced, _ = generate(folder, "--engine", str(folder), "--runtime", "tensorrt")
    assert forced["text"] == by["text"] and driver.calls["cudaGraphLaunch"] == 3


def test_another_gpu_is_named(folder: Path, driver: Driver) -> None:
    driver.major, driver.minor = 12, 0
    row, said = generate(folder, "--engine", str(folder))
    assert row["runtime"] == "onnx"
    assert "onnx runs it: engines for SM89, the GPU is SM120" in said
    _, said = generate(folder, "--engine", str(folder), "--runtime", "tensorrt", code=1)
    assert "this GPU is SM120" in said and "--capability SM120" in said


def test_a_machine_that_cannot_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    row, said = generate(folder, "--engine", str(folder))
    assert row["runtime"] == "onnx" and "not its engines for SM89: running engines needs" in said
    _, said = generate(folder, "--engine", str(folder), "--runtime", "tensorrt", code=1)
    assert "running engines needs cuda-bindings" in said


def test_a_runtime_without_an_engine_is_refused(folder: Path) -> None:
    _, said = generate(folder, "--runtime", "onnx", code=1)
    assert "it says what runs --engine" in said
