"""Target "torch_tensorrt": the graphs that it hands over, and when it refuses.

What the real library makes of them is in test_torch_tensorrt_library.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_cases as cases
import pytest
import torch
from torch.export import ExportedProgram

import arkv_fx
from arkv_fx.errors import ExportError
from arkv_fx.exporting import export, torch_tensorrt_target
from arkv_fx.exporting.programs import make_programs
from arkv_fx.exporting.torch_tensorrt_target import PLAIN, plain

CONFIG = arkv_fx.ArkvConfig(budget=24, window=4, sinks=2, tiers=("int8", "int4"))


def model() -> Any:
    return cases.random_model("llama", num_hidden_layers=2, tie_word_embeddings=False)


def test_plain_graphs_answer_alike() -> None:
    programs = make_programs(model(), CONFIG, None, 1)
    theirs = [programs.engine(name).program for name in ("prefill", "decode")]
    plains = [plain(program) for program in theirs]
    for program in plains:
        assert not {n.target for n in program.graph.nodes} & set(PLAIN)
    ids, mask = (x[:1] for x in cases.prompt())
    mask = (torch.arange(ids.shape[1]) >= 3)[None].long()  # what is padding sees nothing
    with torch.no_grad():
        arguments: tuple[Any, ...] = (ids, mask, torch.arange(ids.shape[1])[None])
        for step, (program, other) in enumerate(zip(plains, theirs, strict=True)):
            found, expected = program.module()(*arguments), other.module()(*arguments)
            # Not the state's numbers: which of equal ranks comes first is not defined for topk.
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
            made = [[(x.shape, x.dtype) for x in outputs] for outputs in (found, expected)]
            assert made[0] == made[1]
            arguments = (ids[:, :1], torch.tensor([[ids.shape[1] + step]]), *expected[1:])


def test_slices_that_count_from_an_end_of_any_length() -> None:
    class Last(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, -8:] + x[:, :, -3:].sum(-1, keepdim=True)[:, -8:] + x.shape[1]

    tokens = torch.export.Dim("tokens", min=9)
    shape: dict[int, Any] = {1: tokens, 2: tokens}
    x = torch.randn(1, 20, 20, generator=torch.Generator().manual_seed(0))
    program: ExportedProgram = torch.export.export(
        Last(), (x,), dynamic_shapes=(shape,), strict=False
    )
    found = plain(program)
    starts = [n.args[2] for n in found.graph.nodes if n.target == torch.ops.aten.slice.Tensor]
    assert len(starts) == 3 and not [s for s in starts if isinstance(s, int) and s < 0]
    for size in 9, 20, 33:
        x = torch.randn(1, size, size, generator=torch.Generator().manual_seed(size))
        assert torch.equal(found.module()(x), Last()(x))


def test_what_has_no_form_is_refused_by_the_operator() -> None:
    config = CONFIG.replace(tiers=("fp8",))
    program = make_programs(model(), config, None, 1).engine("decode").program
    with pytest.raises(ExportError, match=r"^arkv\.to_e4m3\.default has no form that"):
        plain(program)


@pytest.mark.parametrize("kind", [RuntimeError, Exception, OSError])
def test_a_package_that_cannot_be_imported_is_named(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the libraries of TensorRT it raises whatever it likes."""

    def fails(name: str) -> None:
        assert name == "torch_tensorrt"
        raise kind("could not find libnvinfer")

    monkeypatch.setattr(torch_tensorrt_target.importlib, "import_module", fails)
    with pytest.raises(ExportError, match=r"needs torch_tensorrt \(could not find libnvinfer\)"):
        export(model(), None, tmp_path / "p", "torch_tensorrt", config=CONFIG)
    assert not any(tmp_path.iterdir())


def test_what_it_has_no_conversion_for_is_refused_by_name(tmp_path: Path) -> None:
    config = CONFIG.replace(tiers=("fp8",))
    with pytest.raises(ExportError, match="no conversion to fp8: take int8"):
        arkv_fx.export(model(), None, tmp_path / "p", "torch_tensorrt", config=config)


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tensorrt_target, "_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match="there is none: take target 'tensorrt'"):
        arkv_fx.export(model(), None, tmp_path / "p", "torch_tensorrt", config=CONFIG)
    assert not any(tmp_path.iterdir())
