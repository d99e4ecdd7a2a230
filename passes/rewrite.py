"""Replace each planned site by ``arkv::attend`` with the layer's state as graph inputs.

The state tensors become placeholders behind the graph's own, in the order of ``plan.specs()``;
whoever runs the graph appends them. Of several attentions over one cache all but the last only look
(``arkv::peek``). Where the last asks for some of the new tokens only, it looks, too, and the update
follows with the queries of one that asks for all. Does NOT touch a site with a reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from arkv_fx.passes import block_masks, carry, heads
from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import example, op_name, shape
from arkv_fx.passes.readers import SIZES
from arkv_fx.passes.roles import Role, add_input
from arkv_fx.passes.site import Site
from torch.fx import GraphModule, Node

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx.ops.signatures import AttendArguments, ColumnsArguments


def run(graph: GraphModule, context: Context) -> None:
    """Insert placeholders and operators, replace the uses of the old attention."""
    computed = [node for site in context.fused for node in (*site.computed, *site.makers)]
    states: dict[tuple[str, int | None], list[Node]] = {}
    starts: dict[tuple[str, int | None], Node] = {}
    updates: dict[int, AttendArguments[Node]] = {}
    for site in context.fused:
        assert site.plan is not None
        if (key := site.cache_key) not in states:
            cache, like = site.ordinal, example(site.new_k)
            states[key] = [
                add_input(
                    graph,
                    Role("state", cache, spec.name),
                    like.new_empty((site.batch, *spec.shape), dtype=spec.dtype),
                )
                for spec in site.plan.specs()
            ]
            context.state_inputs.append(states[key])
            if site.source == "cat":
                anchor = like.new_empty((1,), dtype=site.plan.dtype)
                _proxy_cache(graph, site, add_input(graph, Role("anchor", cache), anchor))
            if site.source == "buffer":
                start = like.new_empty((), dtype=torch.int64)
                starts[key] = add_input(graph, Role("start", cache), start)
        attention = _replace(graph, site, states[key], starts.get(key), context)
        if site.behind is not None:
            updates[id(site.behind)] = attention
        if (late := updates.get(id(site))) is not None:
            with graph.graph.inserting_before(site.node):
                graph.graph.call_function(torch.ops.arkv.attend.default, *late.call())
    for site in context.fused:
        if site.source == "marker":
            _count_without_cache(site.cache_nodes[0])
    # Not eliminate_dead_code: a user's graph may hold impure nodes that FX does not know of.
    for site in context.sites:
        _erase_dead(graph, [site.node, *site.products])
    # Writes into what is dead, too, and sizes that nobody asks for any more.
    for node in reversed(_with_sizes(graph, computed)):
        if not node.users and not node._erased:
            graph.graph.erase_node(node)
    block_masks.leave_unused_vmaps(graph)
    for site in context.fused:
        _erase_dead(graph, [n for n in site.cache_nodes if not n._erased])


def _count_without_cache(marker: Node) -> None:
    """How many tokens a marker returns is known before it does."""
    for out in marker.users:
        for size in list(out.users):
            dim = size.args[1] if len(size.args) > 1 else size.kwargs.get("dim")
            if op_name(size) in ("size", "sym_size") and dim in (2, -2):
                size.replace_all_uses_with(marker.args[4])  # type: ignore[arg-type]
                size.graph.erase_node(size)


def _with_sizes(graph: GraphModule, computed: Sequence[Node]) -> list[Node]:
    """The nodes and whatever is only a size of them, in order."""
    found = set(computed)
    for node in graph.graph.nodes:
        size = op_name(node) in SIZES or isinstance(example(node), int | torch.SymInt)
        if size and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return [node for node in graph.graph.nodes if node in found]


def _replace(
    graph: GraphModule,
    site: Site,
    state: list[Node],
    start: Node | None,
    context: Context,
) -> AttendArguments[Node]:
    """Write the attention in front of the old one; its operator's arguments."""
    assert site.plan is not None
    emit = heads.Emitter(graph, site.node)
    q, mask, sinks = heads.queries(site, emit), heads.mask(site, emit), heads.sinks(site, emit)
    if mask is not None and start is not None:
        mask = _ending_at_newest(site, mask, start, emit)
    scale = site.scale if site.scale is not None else 1 / math.sqrt((shape(site.q) or ())[-1])
    plan = site.plan.to_json()
    assert site.new_k is not None and site.new_v is not None
    new_k, new_v = k, v = site.new_k, site.new_v
    computed: list[Node] | None = None
    if site.computed:
        new_k, new_v = heads.fold(new_k, emit), heads.fold(new_v, emit)
        asked = ColumnsArguments(new_k, new_v, state, plan, site.fresh)
        found = emit(torch.ops.arkv.columns.default, *asked.call()[0])
        pair = [heads.unfold(emit(operator.getitem, found, i), site.heads, emit) for i in range(2)]
        k, v = carry.replay(site, pair, emit)
        computed = [k, v]
    arguments = AttendArguments(
        q, new_k, new_v, mask, state, plan, float(scale), site.softcap, sinks, site.fresh,
        computed=computed,
    )  # fmt: skip
    with graph.graph.inserting_before(site.node):
        if context.probe is not None and site.last:
            graph.graph.call_function(context.probe, (site.layer, q, k, v, mask, float(scale)))
        if context.stand_in is not None:
            placed, named = arguments.call()
            new = graph.graph.call_function(context.stand_in, (site.layer, *placed), named)
        else:
            updates = site.last and site.behind is None
            op = torch.ops.arkv.attend if updates else torch.ops.arkv.peek
            new = graph.graph.call_function(op.default, *arguments.call())
    value = example(q)
    new.meta = dict(site.node.meta)
    new.meta["example_value"] = value.new_empty(*value.shape[:-1], (shape(site.v) or ())[-1])
    site.node.replace_all_uses_with(heads.output(site, new, emit))
    return arguments


def _ending_at_newest(site: Site, mask: Node, start: Node, emit: heads.Emitter) -> Node:
    """A mask over a whole buffer as one whose last column is the newest token."""
    tokens, columns = emit.size(site.q, -2), emit.size(mask, -1)
    if site.fresh:
        return emit("narrow", mask, 3, 0, tokens)
    with example(mask).fake_mode:
        index = emit(torch.arange, columns, device=example(mask).device)
    plain = isinstance(tokens, int) and isinstance(columns, int)
    ahead = tokens - columns if plain else emit(operator.sub, tokens, columns)
    index = emit(operator.add, index, emit(operator.add, start, ahead))
    return emit("index_select", mask, 3, emit("clamp", index, min=0))


def _proxy_cache(graph: GraphModule, site: Site, anchor: Node) -> None:
    """Give the cache's new value zero-memory tensors of the right shape over the anchor."""
    new, dim = (site.new_k, site.new_v), site.token_dim
    for joined, came, past in zip(site.cache_nodes, new, site.past, strict=True):
        assert came is not None
        sizes: list[Any] = [*(shape(joined) or ())]
        # In a first call what is returned for later is what is attended to now.
        returned = joined is came or came.args[:1] == (joined,)
        with graph.graph.inserting_before(site.node if returned else joined):
            length = graph.graph.call_method("size", (came, 2))
            if past is not None and not site.fresh:
                held = graph.graph.call_method("size", (past, dim))
                length = graph.graph.call_function(_add, (held, length))
            sizes = [length if i == dim else int(size) for i, size in enumerate(sizes)]
            proxy = graph.graph.call_method("expand", (anchor, *sizes))
        proxy.meta = {"example_value": example(joined)}
        if returned:
            joined.replace_all_uses_with(proxy, lambda user: user.op == "output")
        else:
            joined.replace_all_uses_with(proxy)


def _add(a: int, b: int) -> int:
    return a + b


def _erase_dead(graph: GraphModule, roots: list[Node]) -> None:
    """Erase roots and, going up, everything that only they used."""
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node._erased or node.users or node.op not in ("call_function", "call_method"):
            continue
        inputs = node.all_input_nodes
        graph.graph.erase_node(node)
        todo += inputs
