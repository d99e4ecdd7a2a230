"""Linear layers of a rewritten graph in the form that is fastest for their rows on a CPU.

A decode step is bound by reading weights: those that read one input (queries, keys and values; gate
and up) become one call. Weights stay where they are; nothing is packed, copied or to be restored.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from arkv_fx.kernels.cpp import available
from arkv_fx.kernels.cpp.arguments import DTYPES
from arkv_fx.kernels.cpp.linear_operator import few_rows, multiplied_by_torch
from arkv_fx.passes.nodes import arguments, example, may_write, op_name

FEW = torch.ops.arkv_cpu.linear.default
MANY = torch.ops.arkv_cpu.linear_in_float32.default


def fast_products(graph: GraphModule) -> int:
    """Rewrite what can be, in place; returns how many linear layers that were.

    Left alone are layers under autocast, with gradients on or on other devices, weights in other
    dtypes or made of other tensors (quantized, sharded), and all where no C++ can be compiled.
    Layers are joined only if nothing between them may write to what they read.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return 0
    layers = [node for node in graph.graph.nodes if op_name(node) == "linear" and _plain(node)]
    if not layers or available():
        return 0
    groups: dict[Hashable, list[Node]] = {}
    many: list[Node] = []
    writes = accumulate(map(may_write, graph.graph.nodes))
    before = dict(zip(graph.graph.nodes, writes, strict=True))
    for node in layers:
        x, *held = _read(node)
        rows, dtype = example(x).shape[:-1], example(x).dtype
        if all(isinstance(n, int) for n in rows) and prod(rows) <= few_rows(dtype):
            inputs = all(n is None or n.op in ("placeholder", "get_attr") for n in held)
            key = (x, held[1] is None, before[node]) if inputs else node
            groups.setdefault(key, []).append(node)
        elif not multiplied_by_torch(dtype):
            many.append(node)
    for node in many:
        with graph.graph.inserting_before(node):
            _replace(node, graph.graph.call_function(MANY, tuple(_read(node))))
    for nodes in groups.values():
        _join(nodes)
    graph.recompile()
    return len(many) + sum(map(len, groups.values()))


def _join(nodes: list[Node]) -> None:
    """One call where the first of ``nodes`` stands, all of which read one input."""
    graph = nodes[0].graph
    read = [_read(node) for node in nodes]
    biases = [] if read[0][2] is None else [bias for _, _, bias in read]
    with graph.inserting_before(nodes[0]):
        call = graph.call_function(FEW, (read[0][0], [weight for _, weight, _ in read], biases))
        parts = [graph.call_function(operator.getitem, (call, i)) for i in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        _replace(node, part)


def _replace(node: Node, new: Node) -> None:
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _read(node: Node) -> list[Any]:
    """Input, weight and bias (or None) of a linear layer."""
    given = arguments(node, ["input", "weight", "bias"])
    return [given["input"], given["weight"], given.get("bias")]


def _plain(node: Node) -> bool:
    """Whether all of a layer is of one dtype that the library knows, on a CPU, and no subclass.

    What comes out, too: under an autocast within the graph it is not.
    """
    x, weight, bias = (example(given) for given in _read(node))
    tensors = [x, weight] if bias is None and _read(node)[2] is None else [x, weight, bias]
    return (
        all(isinstance(t, Tensor) and t.device.type == "cpu" for t in tensors)
        and not any(map(is_traceable_wrapper_subclass, tensors))
        and len({t.dtype for t in (example(node), *tensors)}) == 1
        and x.dtype in DTYPES
        and all(t.is_contiguous() for t in tensors[1:])
    )
