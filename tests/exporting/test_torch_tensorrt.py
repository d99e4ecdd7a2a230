"""Target "torch_tensorrt": what it hands to a compiler that is not here, and when it refuses.

Torch-TensorRT itself has not run these graphs: it needs a CUDA build of torch and a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_cases as cases
import pytest
import torch
from arkv_fx.passes.nodes import op_name
from torch.export import ExportedProgram

import arkv_fx
from arkv_fx.errors import ExportError
from arkv_fx.exporting import torch_tensorrt_target

CONFIG = arkv_fx.ArkvConfig(budget=24, window=4, sinks=2, tiers=("int8", "int4"))


class Compiler:
    """Remembers what it is asked to compile and save."""

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.compiled: list[tuple[ExportedProgram, dict[str, Any]]] = []
        self.saved: list[str] = []
        self.dynamo = SimpleNamespace(compile=self._compile)
        self.Input = SimpleNamespace

    def _compile(self, program: ExportedProgram, **options: Any) -> str:
        if self.error:
            raise ValueError(self.error)
        self.compiled.append((program, options))
        return "a module"

    def save(self, module: str, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"")
        self.saved.append(Path(path).name)


def export(out: Path, **options: Any) -> Path:
    model = cases.random_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    return arkv_fx.export(model, None, out, "torch_tensorrt", **{"config": CONFIG, **options})


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", found)  # type: ignore[arg-type]
    monkeypatch.setattr(torch_tensorrt_target, "_has_gpu", lambda: True)
    return found


def test_it_is_given_plain_graphs_that_answer_alike(compiler: Compiler, tmp_path: Path) -> None:
    export(tmp_path / "p", longest=300)
    export_ = arkv_fx.export(
        cases.random_model("llama", num_hidden_layers=1, tie_word_embeddings=False),
        None, tmp_path / "t", "torch", config=CONFIG,
    )  # fmt: skip
    assert compiler.saved == ["prefill.pt2", "decode.pt2"]
    (prefill, sizes), (decode, given) = compiler.compiled
    for program in (prefill, decode):
        ours = [n for n in program.graph.nodes if "arkv" in str(n.target)]
        assert not ours, [op_name(n) for n in ours]
    shapes = [(x.min_shape, x.opt_shape, x.max_shape) for x in sizes["arg_inputs"]]
    assert shapes == [((1, 5), (1, 152), (1, 300))] * 3
    theirs = [torch.export.load(export_ / f"{n}.pt2").module() for n in ("prefill", "decode")]
    ids, mask = (x[:1] for x in cases.prompt())
    with torch.no_grad():
        arguments: tuple[Any, ...] = (ids, mask, torch.arange(ids.shape[1])[None])
        for step, (program, other) in enumerate(zip((prefill, decode), theirs, strict=True)):
            found, expected = program.module()(*arguments), other(*arguments)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
            names = [spec.arg.name for spec in program.graph_signature.output_specs]
            assert len(names) == len(found) == len(expected)
            arguments = (ids[:, :1], torch.tensor([[ids.shape[1] + step]]), *expected[1:])
    assert [tuple(x.shape) for x in given["arg_inputs"]][:2] == [(1, 1), (1, 1)]


@pytest.mark.parametrize("kind", [RuntimeError, Exception, OSError])
def test_a_package_that_cannot_be_imported_is_named(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the libraries of TensorRT it raises whatever it likes."""

    def fails(name: str) -> None:
        raise kind("could not find libnvinfer")

    monkeypatch.setattr(torch_tensorrt_target.importlib, "import_module", fails)
    with pytest.raises(ExportError, match=r"needs torch_tensorrt \(could not find libnvinfer\)"):
        export(tmp_path / "p")
    assert not any(tmp_path.iterdir())


def test_without_its_libraries_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"needs torch_tensorrt .*pip install torch-tensorrt"):
        export(tmp_path / "p")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, says",
    [({"tiers": ("fp8",)}, "no conversion to fp8"), ({"budget": 5000}, "at most 3840")],
)
def test_what_it_cannot_compile_is_refused(
    compiler: Compiler, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ExportError, match=says):
        export(tmp_path / "p", config=CONFIG.replace(**change))
    assert not any(tmp_path.iterdir()) and not compiler.compiled


def test_without_a_gpu_it_says_so(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_tensorrt_target, "_has_gpu", lambda: False)
    with pytest.raises(ExportError, match="there is none: take target 'tensorrt'"):
        export(tmp_path / "p")


def test_its_errors_are_handed_on(compiler: Compiler, tmp_path: Path) -> None:
    compiler.error = "no converter"
    with pytest.raises(ExportError, match="prefill graph: Torch-TensorRT says: no converter"):
        export(tmp_path / "p")
    assert not any(tmp_path.iterdir())
