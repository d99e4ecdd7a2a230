"""Replace each planned site by ``arkv::attend`` with the layer's state as graph inputs.

The state tensors become placeholders behind the graph's own, in the order of ``plan.specs()``;
whoever runs the graph appends them. Does NOT touch a site with a reason.
"""

from __future__ import annotations

import math

import torch
from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import example, shape
from arkv_fx.passes.site import Site
from torch.fx import GraphModule, Node

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)


def run(graph: GraphModule, context: Context) -> None:
    """Insert placeholders and operators, replace the uses of the old attention."""
    for site in context.fused:
        state = [placeholder(graph, f"arkv_state_{site.ordinal}_{i}")
                 for i in range(len(site.plan.specs()))]  # type: ignore[union-attr]  # fmt: skip
        context.state_inputs.append(state)
        if site.source == "cat":
            anchor = placeholder(graph, f"arkv_anchor_{site.ordinal}")
            _proxy_cache(graph, site, anchor)
        _replace(graph, site, state, context)
    # Not eliminate_dead_code: a user's graph may hold impure nodes that FX does not know of.
    for site in context.fused:
        _erase_dead(graph, [site.node])
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
    scale = site.scale if site.scale is not None else 1 / math.sqrt(site.plan.k_dim)
    with graph.graph.inserting_before(site.node):
        if context.probe is not None:
            graph.graph.call_function(
                context.probe,
                (site.layer, site.q, site.new_k, site.new_v, site.mask, float(scale)),
            )
        arguments = (site.q, site.new_k, site.new_v, site.mask, state, site.plan.to_json(),
                     float(scale), 0.0, None, site.fresh)  # fmt: skip
        if context.stand_in is not None:
            new = graph.graph.call_function(context.stand_in, (site.layer, *arguments))
        else:
            new = graph.graph.call_function(torch.ops.arkv.attend.default, arguments)
    new.meta = dict(site.node.meta)
    site.node.replace_all_uses_with(new)


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
