"""Target "torch_tensorrt": both graphs compiled by Torch-TensorRT, on the GPU that will run them.

Where its libraries or a GPU are missing it refuses; target "tensorrt" builds engines anywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

import arkv_fx.runtime.operators  # noqa: F401  (registers the operators)
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ExportError
from arkv_fx.exporting.programs import Graph, Programs
from arkv_fx.exporting.target import Target
from arkv_fx.exporting.tensorrt_target import check_formats, stores_float8


def _dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(torch.float32) * scale


def _widen(codes: Tensor) -> Tensor:
    return codes.to(torch.float32)


def _best(rank: Tensor, count: int) -> Tensor:
    return rank.topk(count, dim=-1).indices


PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.arkv.dequantize.default: _dequantize,
    torch.ops.arkv.widen.default: _widen,
    torch.ops.arkv.best.default: _best,
}
"""Our operators in terms of those that Torch-TensorRT knows."""


def check(config: ArkvConfig, **options: Any) -> None:
    """Refuse what needs no graph to be refused.

    Raises:
        ExportError: without Torch-TensorRT or a CUDA GPU, and for fp8, for which it has no
            conversion.
    """
    _compiler()
    if not _has_gpu():
        raise ExportError(
            "target 'torch_tensorrt' compiles for the GPU at hand and there is none: take target "
            "'tensorrt', which builds for chosen compute capabilities without one"
        )
    check_formats(config)
    if stores_float8(config):
        raise ExportError(
            "Torch-TensorRT has no conversion to fp8: take int8, or target 'tensorrt'"
        )


def write(
    folder: Path,
    programs: Programs,
    sidecar: dict[str, Any],
    progress: Callable[[str], None],
    longest: int | None = None,
) -> None:
    """``prefill.pt2`` and ``decode.pt2``, for ``torch_tensorrt.load``.

    Args:
        longest: tokens of the longest prompt; None: the budget's context.

    Raises:
        ExportError: with what Torch-TensorRT said.
    """
    compiler = _compiler()
    span = programs.span(longest, sidecar["config"]["context"])
    for graph in map(programs.engine, ("prefill", "decode")):
        progress(f"compile the {graph.name} graph")
        inputs = _inputs(graph, compiler, span)
        file = f"{graph.name}.pt2"
        try:
            module = compiler.dynamo.compile(
                plain(graph.program), arg_inputs=inputs, min_block_size=1,
                require_full_compilation=True,
            )  # fmt: skip
            compiler.save(
                module, str(folder / file), output_format="exported_program", arg_inputs=inputs
            )
        except Exception as error:  # of any of the libraries behind it
            raise ExportError(f"the {graph.name} graph: Torch-TensorRT says: {error}") from error
        sidecar["graphs"][graph.name]["file"] = file


def _compiler() -> Any:
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # without its libraries it raises a plain one
        raise ExportError(
            f"target 'torch_tensorrt' needs torch_tensorrt ({error}): pip install torch-tensorrt "
            "beside a CUDA build of torch, or take target 'tensorrt', which needs neither"
        ) from error


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def plain(program: ExportedProgram) -> ExportedProgram:
    """The program in operators of torch alone."""
    out: ExportedProgram = program.run_decompositions(PLAIN)
    return out


def _inputs(graph: Graph, compiler: Any, span: tuple[int, int]) -> list[Any]:
    """Samples, and for what is of any length the sizes that it may have."""
    if graph.name != "prefill":
        return list(graph.inputs.values())
    least, longest = span
    return [
        compiler.Input(
            min_shape=(len(x), least), opt_shape=(len(x), (least + longest) // 2),
            max_shape=(len(x), longest), dtype=x.dtype,
        )
        for x in graph.inputs.values()
    ]  # fmt: skip


TARGET = Target("torch_tensorrt", write, ("longest",), check)
