"""A model's whole forward as one graph for every number of tokens, by ``torch.export``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from arkv_fx.errors import TransformError
from arkv_fx.passes.nodes import example, is_symbol


class _Forward(nn.Module):
    """A model whose ``forward`` is the one it had before it was transformed."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.run = model, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


@dataclass
class Captured:
    """A graph with parameters, buffers and the leaves of the call as inputs.

    ``held`` says where each parameter and buffer is found now: (dictionary, name); ``leaves``
    which leaf of (args, kwargs) each other input is; ``plain`` the leaves that are no tensors and
    are built into the graph; ``bounds`` the largest value of each size's symbol.
    """

    graph: GraphModule
    held: dict[str, tuple[Any, str]]
    leaves: dict[str, int]
    plain: dict[int, Any]
    in_spec: TreeSpec
    out_spec: TreeSpec
    bounds: dict[Any, int]

    def constants(self) -> dict[str, Tensor]:
        """Parameters and buffers as they are now, by placeholder."""
        return {name: where[key] for name, (where, key) in self.held.items()}

    def fits(self, leaves: Sequence[Any], spec: TreeSpec, tokens: Any) -> bool:
        """Whether the graph serves a call with these leaves, whatever the value of ``tokens``."""
        if spec != self.in_spec or any(leaves[i] != value for i, value in self.plain.items()):
            return False
        sizes: dict[Any, int] = {}
        for known, found in self._pairs(leaves):
            same = isinstance(found, Tensor) and (known.dtype, known.device, known.dim()) == (
                found.dtype, found.device, found.dim(),
            )  # fmt: skip
            if not same:
                return False
            for size, given in zip(known.shape, found.shape, strict=True):
                if isinstance(size, torch.SymInt):
                    expr = size.node.expr
                    if expr.is_symbol and sizes.setdefault(expr, given) != given:
                        return False
                elif size != given:
                    return False
        return all(
            expr == tokens or 1 < given <= self.bounds.get(expr, given)
            for expr, given in sizes.items()
        )

    def token_dims(self, tokens: Any) -> dict[int, list[int]]:
        """For each leaf the dimensions that count tokens."""
        found: dict[int, list[int]] = {}
        for node in self.graph.graph.find_nodes(op="placeholder"):
            value = example(node)
            if node.name in self.leaves and isinstance(value, Tensor):
                dims = [i for i, size in enumerate(value.shape) if is_symbol(size, tokens)]
                if dims:
                    found[self.leaves[node.name]] = dims
        return found

    def traced(self, tokens: Any) -> int:
        """The number of tokens that the graph was traced with."""
        for node in self.graph.graph.find_nodes(op="placeholder"):
            for size in getattr(example(node), "shape", ()):
                if is_symbol(size, tokens):
                    return int(size.node.hint)
        return 0

    def inputs(self, leaves: Sequence[Any]) -> list[Any]:
        """The graph's inputs for a call, in order."""
        return [
            self.held[n.name][0][self.held[n.name][1]]
            if n.name in self.held
            else leaves[self.leaves[n.name]]
            for n in self.graph.graph.find_nodes(op="placeholder")
        ]

    def output(self, flat: Sequence[Any]) -> Any:
        """What the model returns, from what the graph returns."""
        return tree_unflatten(flat, self.out_spec)

    def _pairs(self, leaves: Sequence[Any]) -> list[tuple[Tensor, Any]]:
        return [
            (example(n), leaves[self.leaves[n.name]])
            for n in self.graph.graph.find_nodes(op="placeholder")
            if n.name in self.leaves and isinstance(example(n), Tensor)
        ]


def capture(
    model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Captured:
    """Trace ``forward`` of ``model``; all extents but the first of each input may vary.

    Raises:
        TransformError: if it cannot be traced as one graph, or writes to its own buffers or inputs.
    """
    name = type(model).__name__
    shim = _Forward(model, forward)
    dims = tree_map(_free, (args, kwargs))
    shapes = [dims[0], *dims[1].values()]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
            program = torch.export.export(shim, args, kwargs, dynamic_shapes=shapes)
            # One dialect without writes; {} keeps attention and projections whole.
            program = program.run_decompositions({})
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise TransformError(
            f"{name} cannot be traced as one graph: {type(error).__name__}: {reason}"
        ) from error
    return _captured(program, shim, args, kwargs)


def _free(leaf: Any) -> Any:
    """Dimensions that may vary: all but the batch."""
    return {i: Dim.AUTO for i in range(1, leaf.dim())} if isinstance(leaf, Tensor) else None


def _captured(
    program: ExportedProgram, shim: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Captured:
    signature = program.graph_signature
    for spec in signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT:
            raise TransformError(
                f"{type(shim.model).__name__} writes to {spec.target or spec.arg} in its forward: "
                "it has a state of its own, so it is not cache-less; use transform without "
                "insert_cache"
            )
    held: dict[str, tuple[Any, str]] = {}
    leaves: dict[str, int] = {}
    plain: dict[int, Any] = {}
    flat, in_spec = tree_flatten((args, kwargs))
    count = 0
    for entry in signature.input_specs:
        if entry.kind == InputKind.USER_INPUT:
            if isinstance(entry.arg, ConstantArgument):
                plain[count] = flat[count]
            else:
                leaves[entry.arg.name] = count
            count += 1
            continue
        target = str(entry.target)
        owner, _, attribute = target.rpartition(".")
        where: Any = program.constants
        if target not in where:
            module = shim.get_submodule(owner)
            where = module._parameters if attribute in module._parameters else module._buffers
            target = attribute
        held[entry.arg.name] = (where, target)
    bounds = {
        symbol: int(span.upper)
        for symbol, span in program.range_constraints.items()
        if span.upper.is_finite and span.upper < 2**31
    }
    graph = program.graph_module
    for node in graph.graph.nodes:
        # Traced with the strides of fused attention, which ours need not have.
        if node.target == torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        # The model's own paths, without the wrapper's.
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            key: (path.removeprefix("model.") if path != "model" else "", kind)
            for key, (path, kind) in stack.items()
        }
    graph.recompile()
    return Captured(graph, held, leaves, plain, in_spec, program.call_spec.out_spec, bounds)
