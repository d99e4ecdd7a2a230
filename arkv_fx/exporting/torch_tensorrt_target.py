"""Target "torch_tensorrt": both graphs compiled by Torch-TensorRT, on the GPU that will run them.

Where its libraries or a GPU are missing it refuses; target "tensorrt" builds engines anywhere.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable
from functools import cache
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
from arkv_fx.exporting.tensorrt_target import check_formats, check_longest, stores_float8


def _dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(torch.float32) * scale


def _widen(codes: Tensor) -> Tensor:
    return codes.to(torch.float32)


def _best(rank: Tensor, count: int) -> Tensor:
    return rank.topk(count, dim=-1).indices


def _exp2(x: Tensor) -> Tensor:
    return (x * math.log(2)).exp()


def _all(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    return (x == 0).any(dim, keepdim).logical_not()


def _diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Of square matrices in the last two dimensions."""
    if (offset, dim1 % x.ndim, dim2 % x.ndim) != (0, x.ndim - 2, x.ndim - 1):
        raise NotImplementedError("only the diagonal of the last two dimensions is known")
    index = torch.arange(x.shape[-1], device=x.device)
    return x[..., index, index]


def _empty_like(x: Tensor, **named: Any) -> Tensor:
    """Where ``x`` is: Torch-TensorRT's own form is on the GPU, wherever the graph was traced."""
    return torch.zeros_like(x)


def _searchsorted(sorted_sequence: Tensor, values: Tensor, **named: Any) -> Tensor:
    """How many are smaller."""
    return (sorted_sequence[..., None, :] < values[..., None]).sum(-1)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """In products and a softmax: the builder of TensorRT-RTX 1.6 and 1.7 ended its process over
    prompt graphs with its own layer for attention.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        rows, columns = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
        mask = rows[:, None] >= columns
    if mask is not None:
        bias = torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask
        # Padding sees nothing: with -inf its row would not be numbers.
        logits = logits + bias.to(q.dtype).clamp(min=torch.finfo(q.dtype).min / 2)
    return logits.softmax(-1) @ v


PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.arkv.dequantize.default: _dequantize,
    torch.ops.arkv.widen.default: _widen,
    torch.ops.arkv.best.default: _best,
    torch.ops.aten.exp2.default: _exp2,
    torch.ops.aten.all.dim: _all,
    torch.ops.aten.diagonal.default: _diagonal,
    torch.ops.aten.empty_like.default: _empty_like,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.searchsorted.Tensor: _searchsorted,
}
"""Our operators, and those that it lacks, in terms of those that Torch-TensorRT knows."""


def check(config: ArkvConfig, longest: int | None = None) -> None:
    """Refuse what needs no graph to be refused.

    Raises:
        ExportError: without Torch-TensorRT or a CUDA GPU, and for fp8, for which it has no
            conversion.
    """
    check_longest(longest)
    check_formats(config)
    if stores_float8(config):
        raise ExportError(
            "Torch-TensorRT has no conversion to fp8: take int8, or target 'tensorrt'"
        )
    _compiler()
    if not torch.cuda.is_available():
        raise ExportError(
            "target 'torch_tensorrt' compiles for the GPU at hand and there is none: take target "
            "'tensorrt', which builds for chosen compute capabilities without one"
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
        longest: tokens of the longest prompt; None: as ``Programs.span`` has it.

    Raises:
        ExportError: with what Torch-TensorRT said.
    """
    compiler = _compiler()
    span = programs.span(longest, sidecar["config"])
    for graph in map(programs.engine, ("prefill", "decode")):
        progress(f"compile the {graph.name} graph")
        file = f"{graph.name}.pt2"
        try:
            module, inputs = compile_graph(compiler, graph, span)
            compiler.save(
                module, str(folder / file), output_format="exported_program", arg_inputs=inputs
            )
        except ExportError as error:
            raise ExportError(f"the {graph.name} graph: {error}; take target 'tensorrt'") from error
        except Exception as error:  # of any of the libraries behind it
            said = str(error) or type(error).__name__
            raise ExportError(f"the {graph.name} graph: Torch-TensorRT says: {said}") from error
        sidecar["graphs"][graph.name]["file"] = file


def compile_graph(compiler: Any, graph: Graph, span: tuple[int, int]) -> tuple[Any, list[Any]]:
    """A graph as one engine, and the inputs for which it was compiled.

    Args:
        compiler: the module ``torch_tensorrt``.
        span: the fewest and the most tokens of a prompt.
    """
    inputs = _inputs(graph, compiler, span)
    module = compiler.dynamo.compile(
        plain(graph.program), arg_inputs=inputs, min_block_size=1, require_full_compilation=True
    )
    return module, inputs


def _compiler() -> Any:
    try:
        compiler = importlib.import_module("torch_tensorrt")
        _convert_gather()
    except Exception as error:  # without its libraries it raises a plain one
        raise ExportError(
            f"target 'torch_tensorrt' needs torch_tensorrt ({error}): pip install "
            "'arkv-fx[torch-tensorrt]', or take target 'tensorrt', which needs no CUDA"
        ) from error
    return compiler


@cache
def _convert_gather() -> None:
    """Torch-TensorRT's own conversion of ``gather``, for dimensions of any length as well.

    TensorRT's layer takes them; only the registration does not say so.
    """
    registry = importlib.import_module("torch_tensorrt.dynamo.conversion")
    kind = importlib.import_module("torch_tensorrt.dynamo._SourceIR").SourceIR.ATEN
    gather = importlib.import_module("torch_tensorrt.dynamo.conversion.impl.select").gather

    def converted(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        return gather(ctx, target, kind, name, *args[:3])

    register = registry.dynamo_tensorrt_converter(
        torch.ops.aten.gather.default, supports_dynamic_shapes=True
    )
    register(converted)


def plain(program: ExportedProgram) -> ExportedProgram:
    """The program in operators that Torch-TensorRT knows.

    Slices that cut nothing off are left out. Others that begin at so many from the end begin at a
    computed place: of two dimensions of any length Torch-TensorRT 2.14 counts both from their end.

    Raises:
        ExportError: for operators of ours that have no plain form, as fp8 needs.
    """
    out: ExportedProgram = program.run_decompositions(PLAIN)
    if ours := sorted(
        {str(n.target) for n in out.graph.nodes if str(n.target).startswith("arkv.")}
    ):
        raise ExportError(f"{', '.join(ours)} has no form that Torch-TensorRT knows")
    for node in out.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor):
        whole, dim, *limits = node.args
        shape, start = whole.meta["val"].shape, limits[0] if limits else None
        if shape == node.meta["val"].shape:
            node.replace_all_uses_with(whole)
            out.graph.erase_node(node)
        elif isinstance(start, int) and start < 0 and not isinstance(shape[dim], int):
            with out.graph.inserting_before(node):
                size = out.graph.call_function(torch.ops.aten.sym_size.int, (whole, dim))
                begin = out.graph.call_function(operator.add, (size, start))
            size.meta["val"], begin.meta["val"] = shape[dim], shape[dim] + start
            node.update_arg(2, begin)
    out.graph.eliminate_dead_code()
    out.graph_module.recompile()
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
