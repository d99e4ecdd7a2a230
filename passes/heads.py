"""Write the operations that bring a site's tensors into the form that ``arkv::attend`` takes.

Queries become [B, Hq, T, D] with the query heads of a kv head side by side, all masks and biases
one mask [B or 1, Hq or 1, T, S], and the output what the old attention gave. Nothing is written
where that is how they are already.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from arkv_fx.passes.layout import Axis, Dims, names, size_of
from arkv_fx.passes.nodes import example, rank_of, same_size, shape, sizes_of
from arkv_fx.passes.sites import Bias, Planned, Site
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves


class Emitter:
    """Writes calls before a node and computes their example values."""

    def __init__(self, graph: GraphModule, before: Node) -> None:
        self.graph, self.before = graph.graph, before

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Call a function, or a tensor's method by its name."""
        with self.graph.inserting_before(self.before):
            if isinstance(target, str):
                node = self.graph.call_method(target, args, kwargs)
            else:
                node = self.graph.call_function(target, args, kwargs)
        values, named = torch.fx.node.map_arg((args, kwargs), example)
        call = getattr(values[0], target) if isinstance(target, str) else target
        # Within the tensors' mode, because an operator may make tensors of its own, and dispatched
        # in Python: a product in C++ (before torch 2.13) makes a symbolic size the sample's number.
        fakes = [x for x in tree_leaves((values, named)) if isinstance(x, FakeTensor)]
        with fakes[0].fake_mode if fakes else nullcontext(), enable_python_dispatcher():
            found = call(*(values[1:] if call != target else values), **named)
        node.meta = {"example_value": found}
        return node

    def size(self, node: Node, dim: int) -> Any:
        """An extent: a number where it is one, else a node."""
        extent = sizes_of(node)[dim]
        return extent if isinstance(extent, int) else self("size", node, dim)


def queries(planned: Planned, emit: Emitter) -> Node:
    """The site's queries as [B, Hq, T, Dk] in the dtype of what is cached."""
    site, q = planned.site, planned.site.q
    if not _plain(site.layout):
        tail = emit.size(q, -2), emit.size(q, -1)
        q = emit("reshape", q, *_sizes(planned, site.layout), *tail)
        order = _order(site.layout)
        q = emit("permute", q, *order, len(order), len(order) + 1)
        q = emit("reshape", q, planned.batch, -1, *tail)
    return as_dtype(q, planned.plan.dtype, emit)


def as_dtype(x: Node, dtype: torch.dtype, emit: Emitter) -> Node:
    """``x``, cast if it is of another dtype."""
    return x if example(x).dtype == dtype else emit("to", x, dtype)


def output(planned: Planned, out: Node, emit: Emitter) -> Node:
    """``out`` [B, Hq, T, Dv] in the layout and dtype of the old attention's output."""
    site = planned.site
    if not _plain(site.out_layout):
        sizes, order = _sizes(planned, site.out_layout), _order(site.out_layout)
        tail = emit.size(out, -2), emit.size(out, -1)
        out = emit("reshape", out, *(sizes[i] for i in order), *tail)
        back = [order.index(i) for i in range(len(order))]
        out = emit("permute", out, *back, len(order), len(order) + 1)
        out = emit("reshape", out, *(prod(_sizes(planned, (d,))) for d in site.out_layout), *tail)
    return as_dtype(out, example(site.node).dtype, emit)


def fold(x: Node, emit: Emitter) -> Node:
    """[B, H, T, D] -> [B, 1, T, H * D]: all heads of a token as one vector."""
    if same_size(sizes_of(x)[1], 1):
        return x
    return emit("unsqueeze", emit("flatten", emit("transpose", x, 1, 2), 2), 1)


def unfold(x: Node, heads: int, emit: Emitter) -> Node:
    """[B, 1, N, H * D] -> [B, H, N, D]."""
    if heads == 1:
        return x
    apart = emit("unflatten", emit("squeeze", x, 1), 2, (heads, -1))
    return emit("transpose", apart, 1, 2)


def sinks(site: Site, emit: Emitter) -> Node | None:
    """One extra logit per query head [Hq], in the order of ``queries``; None if there is none."""
    heads = tuple(axis for dim in site.layout for axis in _present(dim) if axis.name != "0")
    order = _order((heads,))
    if site.sinks is None or order == [*range(len(heads))]:
        return site.sinks
    apart = emit("reshape", site.sinks, *(int(axis.size) for axis in heads))
    return emit("reshape", emit("permute", apart, *order), -1)


def mask(planned: Planned, emit: Emitter) -> Node | None:
    """All masks and biases as one mask [B or 1, Hq or 1, T, S], None if there are none."""
    shown: Node | None = None
    added: Node | None = None
    for bias in planned.site.biases:
        node = _canonical(bias, planned, emit)
        if example(node).dtype == torch.bool:
            node = emit(torch.logical_not, node) if bias.drop else node
            shown = node if shown is None else emit(operator.and_, shown, node)
            continue
        if bias.factor != 1.0:
            # What hides a logit must go on doing so: a smaller number could look like a bias.
            hidden = emit(operator.le, node, torch.finfo(example(node).dtype).min / 2)
            node = emit(operator.mul, node, bias.factor)
            node = emit("masked_fill", node, hidden, float("-inf"))
        added = node if added is None else emit(operator.add, added, node)
    if added is None or shown is None:
        return shown if added is None else added
    # Minus infinity, not the lowest number: adding a bias to that could lift it.
    return emit("masked_fill", added, emit(torch.logical_not, shown), float("-inf"))


def mask_reason(site: Site) -> str:
    """Why the site's masks cannot be brought into one, "" if they can."""
    tokens, keys = sizes_of(site.q)[-2], sizes_of(site.k)[-2]
    for bias in site.biases:
        sizes = shape(bias.node) or ()
        full = (*(size_of(dim) for dim in bias.layout), tokens, keys)
        missing = len(full) - len(sizes)
        fits = missing >= 0 and bool(sizes) and _equal(sizes[-1], keys)
        for size, whole in zip(sizes, full[missing:], strict=False):
            fits = fits and (same_size(size, 1) or _equal(size, whole))
        if not fits:
            return (
                f"mask has shape {[*sizes]}, which is not {[*full]} nor broadcasts to it over "
                "batch, heads and queries"
            )
    return ""


def _equal(a: Any, b: Any) -> bool:
    """Equality of two extents; where two expressions must be compared, this becomes a guard."""
    both = isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt)
    return same_size(a, b) or (both and bool(a == b))


def _canonical(bias: Bias, planned: Planned, emit: Emitter) -> Node:
    """One mask as [B or 1, Hq or 1, T, S]."""
    q, node, layout = planned.site.q, bias.node, bias.layout
    while rank_of(node) < len(layout) + 2:
        node = emit("unsqueeze", node, 0)
    sizes = sizes_of(node)
    if not same_size(sizes[-2], sizes_of(q)[-2]):
        node = emit("expand", node, *[-1] * len(layout), emit.size(q, -2), -1)
    if _plain(layout):
        return node
    # A dimension is whole, or of size 1 and then so are all of its axes.
    axes = [
        axis if not same_size(size, 1) else None
        for dim, size in zip(layout, sizes[:-2], strict=True)
        for axis in _present(dim)
    ]
    tail = emit.size(node, -2), emit.size(node, -1)
    extents = [1 if a is None else _sizes(planned, ((a,),))[0] for a in axes]
    node = emit("reshape", node, *extents, *tail)
    order = _order(layout)
    node = emit("permute", node, *order, len(order), len(order) + 1)
    flat = [axis for dim in layout for axis in _present(dim)]
    batched = bool(order) and flat[order[0]].name == "0"
    heads = order[1:] if batched else order
    if any(axes[i] is not None for i in heads):  # all heads or none
        whole = _sizes(planned, (tuple(flat[i] for i in heads),))
        node = emit("expand", node, *[-1] * batched, *whole, -1, -1)
    return emit("reshape", node, extents[order[0]] if batched else 1, -1, *tail)


def _present(dim: tuple[Axis, ...]) -> list[Axis]:
    return [axis for axis in dim if not same_size(axis.size, 1)]


def _sizes(planned: Planned, layout: Dims) -> list[int]:
    """Sizes of the present axes; a symbolic batch has been given its number."""
    flat = [axis for dim in layout for axis in _present(dim)]
    return [planned.batch if axis.name == "0" else int(axis.size) for axis in flat]


def _plain(layout: Dims) -> bool:
    """Whether the leading dimensions are batch, then heads with their copies side by side."""
    if len(layout) != 2:
        return False
    first, second = names(layout)
    return first in ((), ("0",)) and [*second] == sorted(second) and "0" not in second


def _order(layout: Dims) -> list[int]:
    """Positions of batch, kv heads and copies among the present axes."""
    flat = [axis.name for dim in layout for axis in _present(dim)]
    return sorted(range(len(flat)), key=lambda i: flat[i])
