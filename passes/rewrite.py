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

import torch
from arkv_fx.passes import block_masks, carry, heads
from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.nodes import example, op_name, sizes_of
from arkv_fx.passes.readers import SIZES
from arkv_fx.passes.roles import Role, add_input
from arkv_fx.passes.sites import Buffer, Cat, Marker, Planned
from torch.fx import GraphModule, Node

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx.ops.signatures import AttendArguments, ColumnsArguments


def run(graph: GraphModule, context: Context) -> int:
    """Insert placeholders and operators, replace the uses of the old attention."""
    computed = [n for p in context.fused for n in (*p.cache.computed, *p.site.makers)]
    states: dict[tuple[str, int | None], list[Node]] = {}
    starts: dict[tuple[str, int | None], Node] = {}
    updates: dict[Node, AttendArguments[Node]] = {}
    for planned in context.fused:
        site, cache, plan = planned.site, planned.cache, planned.plan
        if (key := site.cache_key) not in states:
            owner, like = site.ordinal, example(cache.new_k)
            states[key] = [
                add_input(
                    graph,
                    Role("state", owner, spec.name),
                    like.new_empty((planned.batch, *spec.shape), dtype=spec.dtype),
                )
                for spec in plan.specs()
            ]
            context.state_inputs.append(states[key])
            if isinstance(cache, Cat):
                anchor = like.new_empty((1,), dtype=plan.dtype)
                anchored = add_input(graph, Role("anchor", owner), anchor)
                _proxy_cache(graph, cache, site.node, anchored)
            if isinstance(cache, Buffer):
                start = like.new_empty((), dtype=torch.int64)
                starts[key] = add_input(graph, Role("start", owner), start)
        attention = _replace(graph, planned, states[key], starts.get(key), context)
        if cache.behind is not None:
            updates[cache.behind] = attention
        if (late := updates.get(site.node)) is not None:
            with graph.graph.inserting_before(site.node):
                graph.graph.call_function(torch.ops.arkv.attend.default, *late.call())
    for planned in context.fused:
        if isinstance(planned.cache, Marker):
            _count_without_cache(planned.cache.node)
    # Not eliminate_dead_code: a user's graph may hold impure nodes that FX does not know of.
    for site in context.sites:
        _erase_dead(graph, [site.node, *site.products])
    # Writes into what is dead, too, and sizes that nobody asks for any more.
    for node in reversed(_with_sizes(graph, computed)):
        if not node.users and not node._erased:
            graph.graph.erase_node(node)
    block_masks.leave_unused_vmaps(graph)
    for planned in context.fused:
        _erase_dead(graph, [n for n in planned.cache.nodes if not n._erased])
    return len(context.fused)


PASS = Pass("rewrite", run, needs=("plans",), gives=("operators",))


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
    planned: Planned,
    state: list[Node],
    start: Node | None,
    context: Context,
) -> AttendArguments[Node]:
    """Write the attention in front of the old one; its operator's arguments."""
    site, cache, layer = planned.site, planned.cache, planned.layer
    emit = heads.Emitter(graph, site.node)
    q, mask = heads.queries(planned, emit), heads.mask(planned, emit)
    sinks = heads.sinks(site, emit)
    if mask is not None and start is not None:
        mask = _ending_at_newest(planned, mask, start, emit)
    scale = site.scale if site.scale is not None else 1 / math.sqrt(sizes_of(site.q)[-1])
    plan = planned.plan.to_json()
    dtype = planned.plan.dtype
    new_k, new_v = (heads.as_dtype(x, dtype, emit) for x in (cache.new_k, cache.new_v))
    k, v = new_k, new_v
    computed: list[Node] | None = None
    if cache.computed:
        new_k, new_v = heads.fold(new_k, emit), heads.fold(new_v, emit)
        asked = ColumnsArguments(new_k, new_v, state, plan, cache.fresh)
        found = emit(torch.ops.arkv.columns.default, *asked.call()[0])
        pair = [
            heads.unfold(emit(operator.getitem, found, i), planned.heads, emit) for i in range(2)
        ]
        k, v = (heads.as_dtype(x, dtype, emit) for x in carry.replay(planned, pair, emit))
        computed = [k, v]
    arguments = AttendArguments(
        q, new_k, new_v, mask, state, plan, float(scale), site.softcap, sinks, cache.fresh,
        computed=computed,
    )  # fmt: skip
    with graph.graph.inserting_before(site.node):
        if context.probe is not None and cache.last:
            graph.graph.call_function(context.probe, (layer, q, k, v, mask, float(scale)))
        if context.stand_in is not None:
            placed, named = arguments.call()
            new = graph.graph.call_function(context.stand_in, (layer, *placed), named)
        else:
            updates = cache.last and cache.behind is None
            op = torch.ops.arkv.attend if updates else torch.ops.arkv.peek
            new = graph.graph.call_function(op.default, *arguments.call())
    value = example(q)
    new.meta = dict(site.node.meta)
    new.meta["example_value"] = value.new_empty(*value.shape[:-1], sizes_of(site.v)[-1])
    site.node.replace_all_uses_with(heads.output(planned, new, emit))
    return arguments


def _ending_at_newest(planned: Planned, mask: Node, start: Node, emit: heads.Emitter) -> Node:
    """A mask over a whole buffer as one whose last column is the newest token."""
    tokens, columns = emit.size(planned.site.q, -2), emit.size(mask, -1)
    if planned.cache.fresh:
        return emit("narrow", mask, 3, 0, tokens)
    with example(mask).fake_mode:
        index = emit(torch.arange, columns, device=example(mask).device)
    plain = isinstance(tokens, int) and isinstance(columns, int)
    ahead = tokens - columns if plain else emit(operator.sub, tokens, columns)
    index = emit(operator.add, index, emit(operator.add, start, ahead))
    return emit("index_select", mask, 3, emit("clamp", index, min=0))


def _proxy_cache(graph: GraphModule, cache: Cat, attention: Node, anchor: Node) -> None:
    """Give the cache's new value zero-memory tensors of the right shape over the anchor."""
    new, dim = (cache.new_k, cache.new_v), cache.token_dim
    for joined, came, past in zip(cache.nodes, new, cache.past, strict=True):
        # In a first call what is returned for later is what is attended to now.
        returned = joined is came or came.args[:1] == (joined,)
        with graph.graph.inserting_before(attention if returned else joined):
            length = graph.graph.call_method("size", (came, 2))
            if past is not None and not cache.fresh:
                held = graph.graph.call_method("size", (past, dim))
                length = graph.graph.call_function(_add, (held, length))
            sizes = [length if i == dim else int(s) for i, s in enumerate(sizes_of(joined))]
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
