"""Find calls of ``flex_attention``: write out the attention that each stands for, and read that.

``score_mod`` and ``mask_mod`` come as graphs over one logit and its four indices. Over indices that
broadcast to all logits they are what hand-written attention has between its product and its
softmax, so ``find_softmax`` understands them. The call itself stays until its site is rewritten;
what was written out is never run. Does NOT fire where a modification is more than pointwise
operations and look-ups by index, where a block mask without a ``mask_mod`` leaves out blocks, nor
where the log-sum-exp is read.
"""

from __future__ import annotations

from typing import Any

import torch
from arkv_fx.passes import block_masks, find_softmax
from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.heads import Emitter
from arkv_fx.passes.nodes import example, module_path, op_name, rank_of, same_size, shape
from arkv_fx.passes.sites import Site
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

WITHOUT_BLOCKS = 1 << 30
"""Block size of the mask that ``flex_attention`` makes where it is given none."""
OTHER_NAMES = {
    "truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "invert": "bitwise_not",
    "and_": "bitwise_and", "or_": "bitwise_or", "xor": "bitwise_xor",
}  # fmt: skip
INDEXES = {"getitem", "index", "to", "_to_copy", "float", "int", "long", "bool", "type"}
MAKES = {
    "new_ones", "new_zeros", "new_full", "full", "ones", "zeros", "tensor", "scalar_tensor",
    "lift_fresh_copy",
}  # fmt: skip


class _NotFollowedError(Exception):
    """A call cannot be written out; the message says why."""


def run(graph: GraphModule, context: Context) -> int:
    """Append a ``Site`` to ``context.sites`` for each call whose output is used."""
    before = len(context.sites)
    for node in list(graph.graph.nodes):
        if op_name(node) == "flex_attention" and len(node.args) >= 9:
            parts = {user.args[1]: user for user in node.users if user.users}
            if 0 in parts:
                context.sites.append(_site(graph, node, parts, len(context.sites)))
    return len(context.sites) - before


PASS = Pass("find_flex", run, gives=("sites",))


def _site(graph: GraphModule, call: Node, parts: dict[Any, Node], ordinal: int) -> Site:
    q, k, v = call.args[:3]
    site: Site | None = None
    try:
        if len(parts) > 1:
            raise _NotFollowedError("its log-sum-exp or its maximum is read")
        site = find_softmax.read(_written_out(graph, call), ordinal)
        reason = "" if site is not None else "what it stands for could not be read"
    except _NotFollowedError as error:
        reason = str(error)
    if site is None:
        site = Site(call, ordinal, "", q, k, v)  # type: ignore[arg-type]
        site.refuse(f"flex_attention: {reason}")
    site.node, site.path = parts[0], module_path(call) or module_path(parts[0])
    site.makers = block_masks.makers(call)
    site.products = list(dict.fromkeys([*site.products, call]))
    return site


def _written_out(graph: GraphModule, call: Node) -> Node:
    """The softmax of the attention that a call stands for, written in front of it."""
    given: Any = call.args[:9]
    q, k, v, score_mod, block_mask, scale, _, score_inputs, mask_inputs = given
    mask_mod, block_sizes = block_mask[-1], block_mask[-3:-1]
    emit = Emitter(graph, call)
    queries, keys = shape(q), shape(k)
    if queries is None or keys is None or not same_size(queries[0], keys[0]):
        raise _NotFollowedError(f"queries {queries} and keys {keys} have other batch sizes")
    if not isinstance(scale, int | float):
        raise _NotFollowedError("the scale is computed in the graph, not a constant")
    indices = [_Index(emit, q, 0, 0), _Index(emit, q, 1, 1), _Index(emit, q, 2, 2)]
    indices.append(_Index(emit, k, 2, 3))
    copies = queries[1] // keys[1]
    if copies != 1:
        k, v = (emit("repeat_interleave", x, copies, dim=1) for x in (k, v))
    logits = emit(torch.matmul, q, emit("transpose", k, -1, -2))
    logits = emit(torch.mul, logits, scale)
    logits = _inlined(graph, score_mod, [logits, *indices], score_inputs, emit)
    placeholders = _body(graph, mask_mod).find_nodes(op="placeholder")
    if any(node.users for node in placeholders[2:]):
        shown = _inlined(graph, mask_mod, indices, mask_inputs, emit)
        logits = emit(torch.where, shown, logits, float("-inf"))
    elif block_sizes != (WITHOUT_BLOCKS,) * 2:
        raise _NotFollowedError(
            "its block mask leaves out blocks without a mask_mod that says which tokens these are"
        )
    softmax = emit(torch.softmax, logits, -1)
    emit(torch.matmul, softmax, v)
    return softmax


def _body(graph: GraphModule, mod: Node) -> Graph:
    """The graph of a modification."""
    module = graph.get_submodule(str(mod.target))
    assert isinstance(module, GraphModule)
    return module.graph


class _Index:
    """The index along one dimension of the logits, written when it is first used."""

    def __init__(self, emit: Emitter, tensor: Any, dim: int, place: int) -> None:
        self.emit, self.tensor, self.dim, self.place = emit, tensor, dim, place
        self.node: Node | None = None

    def __call__(self) -> Node:
        if self.node is None:
            like = example(self.tensor)
            with like.fake_mode:
                length = self.emit.size(self.tensor, self.dim)
                index = self.emit(torch.arange, length, device=like.device)
            sizes = [-1 if place == self.place else 1 for place in range(4)]
            self.node = self.emit("view", index, *sizes)
        return self.node


def _inlined(graph: GraphModule, mod: Any, given: list[Any], inputs: Any, emit: Emitter) -> Node:
    """What ``score_mod`` or ``mask_mod`` gives for all logits at once, [B|1, H|1, T|1, S|1]."""
    values: dict[Node, Any] = {}
    given = [*given, *inputs]
    for node in _body(graph, mod).nodes:
        if node.op == "placeholder":
            value = given[len(values)]
            used = isinstance(value, _Index) and node.users
            values[node] = value() if used else value
        elif node.op == "output":
            result: Node = values[node.args[0]]
            return result
        else:
            values[node] = _copy(node, values, emit)
    raise AssertionError("a graph has an output")


def _copy(node: Node, values: dict[Node, Any], emit: Emitter) -> Node:
    """One operation of a modification, on all logits at once instead of on one."""
    name = op_name(node)
    if not (name in INDEXES | MAKES or _is_pointwise(name)):
        raise _NotFollowedError(
            f"{node.format_node()} in its score_mod or mask_mod is not a pointwise operation"
        )
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    out = emit(node.target, *args, **kwargs)
    if not isinstance(example(out), FakeTensor) or rank_of(out) not in (0, 4):
        raise _NotFollowedError(
            f"{node.format_node()} in its score_mod or mask_mod is more than one number per logit"
        )
    return out


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, OTHER_NAMES.get(name, name), None)
    return name == "where" or (
        packet is not None
        and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())
    )
