"""Linear layers of a rewritten graph in the form that is fastest for their rows on a CPU.

A decode step is bound by reading weights: those that read one input (queries, keys and values; gate
and up) become one call. Weights stay where they are, those that torchao quantized, too: the graph
takes the tensors that they are made of. Nothing is packed, copied or to be restored.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from arkv_fx.compile.linear_forms import Form, form_of
from arkv_fx.kernels.cpp import available
from arkv_fx.passes.nodes import arguments, example, may_write, op_name


def fast_products(graph: GraphModule) -> int:
    """Rewrite what can be, in place; returns how many linear layers that were.

    Left alone are layers under autocast, with gradients on or on other devices, weights in other
    dtypes or made of tensors that ``form_of`` does not know, and all where no C++ can be compiled.
    Layers are joined only if nothing between them may write to what they read.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return 0
    layers = {n: _form(n) for n in graph.graph.nodes if op_name(n) == "linear"}
    forms = {node: form for node, form in layers.items() if form is not None}
    if not forms or available():
        return 0
    groups: dict[Hashable, list[Node]] = {}
    many: list[Node] = []
    writes = accumulate(map(may_write, graph.graph.nodes))
    before = dict(zip(graph.graph.nodes, writes, strict=True))
    for node, form in forms.items():
        x, *held = _read(node)
        rows = example(x).shape[:-1]
        if all(isinstance(n, int) for n in rows) and prod(rows) <= form.rows:
            inputs = all(n is None or n.op in ("placeholder", "get_attr") for n in held)
            key = (x, held[1] is None, before[node], form) if inputs else node
            groups.setdefault(key, []).append(node)
        elif form.many is not None:
            many.append(node)
    for node in many:
        x, weight, bias = _read(node)
        form = forms[node]
        with graph.graph.inserting_before(node):
            given = (x, *_parts(weight, form), bias, *form.rest)
            _replace(node, graph.graph.call_function(form.many, given))
    for nodes in groups.values():
        _join(nodes, forms[nodes[0]])
    graph.recompile()
    return len(many) + sum(map(len, groups.values()))


def _join(nodes: list[Node], form: Form) -> None:
    """One call where the first of ``nodes`` stands, all of which read one input."""
    graph = nodes[0].graph
    read = [_read(node) for node in nodes]
    biases = [] if read[0][2] is None else [bias for _, _, bias in read]
    with graph.inserting_before(nodes[0]):
        parts = zip(*(_parts(weight, form) for _, weight, _ in read), strict=True)
        lists = [[part for part in some if part is not None] for some in parts]
        call = graph.call_function(form.few, (read[0][0], *lists, biases, *form.rest))
        outs = [graph.call_function(operator.getitem, (call, i)) for i in range(len(nodes))]
    for node, out in zip(nodes, outs, strict=True):
        _replace(node, out)


def _parts(weight: Node, form: Form) -> list[Node | None]:
    """A weight, or the tensors that it is made of, where the graph is being written."""
    return [_part(weight, name) for name in form.parts] if form.parts else [weight]


def _part(weight: Node, name: str | None) -> Node | None:
    if name is None:
        return None
    node = weight.graph.call_function(getattr, (weight, name))
    node.meta["example_value"] = getattr(example(weight), name)
    return node


def _replace(node: Node, new: Node) -> None:
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _read(node: Node) -> list[Any]:
    """Input, weight and bias (or None) of a linear layer."""
    given = arguments(node, ["input", "weight", "bias"])
    return [given["input"], given["weight"], given.get("bias")]


def _form(node: Node) -> Form | None:
    """What can take a layer's place, if anything."""
    given = _read(node)
    if given[2] is not None and example(given[2]) is None:
        return None
    x, weight, bias = map(example, given)
    return form_of(x, weight, bias, example(node))
