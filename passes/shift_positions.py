"""Let positions go on where the last call stopped, in a model that always counts from zero.

``arange(T)`` becomes ``arange(T) + offset``, and the first T rows of a table (``wpe.weight[:T]``,
``cos[:T]``) become the T rows from ``offset`` on. Fires only where a state was inserted, and not in
a graph for the first tokens. Does NOT touch a slice of anything that depends on the model's input,
nor counts in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.fold import is_constant
from arkv_fx.passes.nodes import arguments, example, is_symbol, op_name, shape
from arkv_fx.passes.roles import Role, add_input, added
from torch.fx import GraphModule, Node

SLICE = ["x", "dim", "start", "end", "step"]


def run(graph: GraphModule, context: Context) -> int:
    """Add the input ``arkv_offset`` (int64 scalar), tokens before this call, and use it."""
    insertion = context.insertion
    if insertion is None or insertion.fresh or not context.fused:
        return 0
    offset = offset_input(graph, context)
    matches = 0
    for node in list(graph.graph.nodes):
        if not node.users:
            continue
        if counts(node, insertion.tokens):
            with graph.graph.inserting_after(node):
                shifted = graph.graph.call_function(torch.ops.aten.add.Tensor, (node, offset))
            node.replace_all_uses_with(shifted, lambda user, own=shifted: user is not own)
            shifted.meta = dict(node.meta)
            matches += 1
        elif (dim := first_rows(node, insertion.tokens)) is not None and is_constant(
            node, insertion.constants
        ):
            _take_rows(graph, node, dim, offset)
            matches += 1
    return matches


PASS = Pass("shift_positions", run, needs=("operators", "masks"), gives=("positions",))


def offset_input(graph: GraphModule, context: Context) -> Node:
    """The input ``arkv_offset``, behind all others; made on first use."""
    for node in added(graph, "offset"):
        return node
    like = example(context.fused[0].cache.new_k)
    return add_input(graph, Role("offset"), like.new_empty((), dtype=torch.int64))


def counts(node: Node, tokens: Any) -> bool:
    """Whether ``node`` is 0, 1, .. T - 1."""
    if op_name(node) != "arange" or not is_symbol(_extent(node, 0), tokens):
        return False
    numbers = list(node.args)
    start = numbers[0] if len(numbers) > 1 else node.kwargs.get("start", 0)
    step = numbers[2] if len(numbers) > 2 else node.kwargs.get("step", 1)
    return (start, step) == (0, 1)


def first_rows(node: Node, tokens: Any) -> int | None:
    """The dimension of which ``node`` takes the first T rows, or None."""
    if op_name(node) != "slice":
        return None
    given = arguments(node, SLICE)
    dim = given.get("dim", 0)
    whole = is_symbol(_extent(given["x"], dim), tokens)
    if whole or not is_symbol(_extent(node, dim), tokens):
        return None
    return dim if (given.get("start") or 0, given.get("step", 1)) == (0, 1) else None


def _take_rows(graph: GraphModule, node: Node, dim: int, offset: Node) -> None:
    given = arguments(node, SLICE)
    with graph.graph.inserting_before(node):
        options = {"device": example(node).device}
        rows = graph.graph.call_function(torch.ops.aten.arange.default, (given["end"],), options)
        at = graph.graph.call_function(torch.ops.aten.add.Tensor, (rows, offset))
        taken = graph.graph.call_function(
            torch.ops.aten.index_select.default, (given["x"], dim, at)
        )
    taken.meta = dict(node.meta)
    node.replace_all_uses_with(taken)
    graph.graph.erase_node(node)


def _extent(node: Any, dim: int) -> Any:
    sizes = shape(node) or ()
    return sizes[dim] if -len(sizes) <= dim < len(sizes) else None
