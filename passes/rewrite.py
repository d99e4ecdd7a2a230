"""Replace each planned site by ``arkv::attend`` with the layer's state as graph inputs.

The state tensors become placeholders behind the graph's own, in the order of ``plan.specs()``;
whoever runs the graph appends them. Of several attentions over one cache all but the last only look
(``arkv::peek``). Does NOT touch a site with a reason.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from arkv_fx.passes import carry, heads
from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import example, shape
from arkv_fx.passes.site import Site
from torch.fx import GraphModule, Node

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)


def run(graph: GraphModule, context: Context) -> None:
    """Insert placeholders and operators, replace the uses of the old attention."""
    computed = [
        node
        for site in context.fused
        if site.rows is not None
        for node in carry.made_of(site.cache_nodes[0], [site.node])
    ]
    states: dict[tuple[str, int | None], list[Node]] = {}
    for site in context.fused:
        assert site.plan is not None
        if (key := site.cache_key) not in states:
            states[key] = [
                placeholder(graph, f"arkv_state_{site.ordinal}_{i}")
                for i in range(len(site.plan.specs()))
            ]
            for node, spec in zip(states[key], site.plan.specs(), strict=True):
                size = (site.batch, *spec.shape)
                node.meta = {"example_value": example(site.new_k).new_empty(size, dtype=spec.dtype)}
            context.state_inputs.append(states[key])
            if site.source == "cat":
                anchor = placeholder(graph, f"arkv_anchor_{site.ordinal}")
                _proxy_cache(graph, site, anchor)
        _replace(graph, site, states[key], context)
    # Not eliminate_dead_code: a user's graph may hold impure nodes that FX does not know of.
    for site in context.fused:
        _erase_dead(graph, [site.node])
    for node in dict.fromkeys(reversed(computed)):  # writes into what is dead, too
        if not node.users and not node._erased:
            graph.graph.erase_node(node)
    for site in context.fused:
        _erase_dead(graph, [n for n in site.cache_nodes if not n._erased])


def placeholder(graph: GraphModule, name: str) -> Node:
    """A new input behind all others."""
    last = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if last:
        with graph.graph.inserting_after(last[-1]):
            return graph.graph.placeholder(name)
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        return graph.graph.placeholder(name)


def _replace(graph: GraphModule, site: Site, state: list[Node], context: Context) -> None:
    assert site.plan is not None
    emit = heads.Emitter(graph, site.node)
    q, mask, sinks = heads.queries(site, emit), heads.mask(site, emit), heads.sinks(site, emit)
    scale = site.scale if site.scale is not None else 1 / math.sqrt((shape(site.q) or ())[-1])
    plan = site.plan.to_json()
    arguments = (q, site.new_k, site.new_v, mask, state, plan, float(scale), site.softcap, sinks,
                 site.fresh)  # fmt: skip
    k, v = site.new_k, site.new_v
    rows: dict[str, Any] = {}
    if site.rows is not None:
        found = emit(torch.ops.arkv.columns.default, k, v, state, plan, site.fresh)
        pair = emit(operator.getitem, found, 0), emit(operator.getitem, found, 1)
        k, v = carry.replay(site, pair, emit)
        rows = {"rows": [k, v]}
    with graph.graph.inserting_before(site.node):
        if context.probe is not None and site.last:
            graph.graph.call_function(context.probe, (site.layer, q, k, v, mask, float(scale)))
        if context.stand_in is not None:
            new = graph.graph.call_function(context.stand_in, (site.layer, *arguments))
        else:
            op = torch.ops.arkv.attend if site.last else torch.ops.arkv.peek
            new = graph.graph.call_function(op.default, arguments, rows)
    value = example(q)
    new.meta = dict(site.node.meta)
    new.meta["example_value"] = value.new_empty(*value.shape[:-1], (shape(site.v) or ())[-1])
    site.node.replace_all_uses_with(heads.output(site, new, emit))


def _proxy_cache(graph: GraphModule, site: Site, anchor: Node) -> None:
    """Give the cache's new value zero-memory tensors of the right shape over the anchor."""
    new = (site.new_k, site.new_v)
    for joined, came, past in zip(site.cache_nodes, new, site.past, strict=True):
        sizes = shape(joined)
        assert sizes is not None
        with graph.graph.inserting_before(joined):
            length = graph.graph.call_method("size", (came, 2))
            if past is not None and not site.fresh:
                held = graph.graph.call_method("size", (past, 2))
                length = graph.graph.call_function(_add, (held, length))
            proxy = graph.graph.call_method(
                "expand", (anchor, int(sizes[0]), int(sizes[1]), length, int(sizes[3]))
            )
        proxy.meta = {"example_value": example(joined)}
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
