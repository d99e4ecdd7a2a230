"""Keys and values that a model makes of its cache token by token: latents expanded to heads.

Such a computation gives the same for a token wherever it stands, so it may run over slots, which
are unordered, as well as over all tokens. It is copied, reading ``arkv::columns``. Does NOT take
an operation that it does not know to treat tokens alike, nor one in which the token axis is mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from arkv_fx.passes.heads import Emitter
from arkv_fx.passes.layout import VIEWS
from arkv_fx.passes.nodes import (
    arguments,
    example,
    numbers,
    op_name,
    rank_of,
    same_size,
    shape,
    sizes_of,
    whole_index,
)
from arkv_fx.passes.readers import SIZES
from arkv_fx.passes.sites import Cache, Planned, Site
from torch.fx import Node

from arkv_fx.errors import PassError

POINTWISE = {
    "add", "sub", "rsub", "mul", "div", "truediv", "neg", "pow", "square", "rsqrt", "sqrt", "exp",
    "sigmoid", "silu", "gelu", "relu", "tanh", "to", "_to_copy", "type_as", "float", "contiguous",
    "clone", "copy_", "detach", "iadd", "imul",
}  # fmt: skip
SPLITS = {"split", "chunk", "tensor_split", "split_with_sizes", "unbind"}
PER_VECTOR = {"linear", "layer_norm", "rms_norm"}
RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}
MADE = {"new_empty", "new_zeros", "empty_like", "zeros_like"}


def made_of(marker: Node, stops: Sequence[Node]) -> list[Node]:
    """Everything computed from the marker's outputs up to the ``stops``, in order; no sizes."""
    found, ends = {marker}, set(stops)
    out = []
    for node in marker.graph.nodes:
        if node in ends or op_name(node) in SIZES or example(node) is None:
            continue
        if not found.isdisjoint(node.all_input_nodes) and not isinstance(example(node), _SCALARS):
            found.add(node)
            out.append(node)
    return out


_SCALARS = (int, float, torch.SymInt, torch.SymFloat)


def obstacle(site: Site, cache: Cache) -> str:
    """Why the site's keys and values cannot be computed from slots, "" if they can."""
    axes: dict[Node, int] = {}
    for node in cache.computed:
        if reason := _follow(node, axes):
            return reason
    for x in (site.k, site.v):
        if axes.get(x) != 2:
            return "keys or values are not made of what the cache returns"
    return ""


def _follow(node: Node, axes: dict[Node, int]) -> str:
    """Note which dimension of the next node counts tokens, or say why it has none."""
    axis: int | None
    if isinstance(example(node), torch.Tensor):
        axis = _axis(node, axes)
    elif op_name(node) not in SPLITS:
        return f"what the cache returns is read by {node.format_node()}"
    else:
        axis = axes.get(node.args[0])  # type: ignore[arg-type]
        dim = arguments(node, ["input", "size", "dim"]).get("dim", 0)
        if axis is not None and (not isinstance(dim, int) or dim % rank_of(node.args[0]) == axis):
            axis = None
    if axis is None:
        return _mixed(node)
    axes[node] = axis
    return ""


def _is_output(node: Node) -> bool:
    """Whether ``node`` is one of the marker's two outputs."""
    return bool(node.args) and op_name(node.args[0]) == "kv_update"


def _mixed(node: Node) -> str:
    return (
        f"between cache and attention, {node.format_node()} may mix tokens, or is not known to "
        "treat them alike"
    )


def _axis(node: Node, axes: dict[Node, int]) -> int | None:
    """Which dimension of ``node`` counts tokens, None if that cannot be told."""
    name, sizes = op_name(node), sizes_of(node)
    inputs = [n for n in node.all_input_nodes if n in axes]
    if _is_output(node):
        return 2
    if name == "getitem" and not isinstance(example(node.args[0]), torch.Tensor):
        return axes.get(node.args[0])  # type: ignore[arg-type]
    if not inputs:
        return None
    first = axes[inputs[0]]
    if name in MADE:
        # One of its sizes counts tokens; if several could, what is copied into it must agree.
        tokens = sizes_of(inputs[0])[first]
        where = [i for i, s in enumerate(sizes) if same_size(s, tokens)]
        usual = len(sizes) - 2
        return usual if usual in where else where[0] if len(where) == 1 else None
    if name in POINTWISE:
        from_right = {rank_of(n) - axes[n] for n in inputs}
        others = [n for n in node.all_input_nodes if n not in axes and shape(n)]
        if len(from_right) != 1:
            return None
        right = from_right.pop()
        if any(rank_of(n) >= right and not same_size(sizes_of(n)[-right], 1) for n in others):
            return None
        return len(sizes) - right
    if len(inputs) > 1 and name != "cat":
        return None
    rank = rank_of(inputs[0])
    if name in PER_VECTOR:
        return first if first < rank - 1 and node.args[0] is inputs[0] else None
    if name in ("mean", "sum", "var"):
        given = arguments(node, ["input", "dim", "keepdim"])
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not given.get("keepdim") or not isinstance(dims, list | tuple):
            return None
        return first if first not in [d % rank for d in dims] else None
    if name in RESHAPES:
        return _reshaped(sizes_of(inputs[0]), first, sizes)
    if name in ("transpose", "swapaxes"):
        given = arguments(node, ["input", "dim0", "dim1"])
        a, b = given.get("dim0"), given.get("dim1")
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        return {a % rank: b % rank, b % rank: a % rank}.get(first, first)
    if name == "permute":
        order = numbers(node, "dims")
        return [d % rank for d in order].index(first) if order is not None else None
    if name == "unsqueeze":
        at = int(arguments(node, ["input", "dim"])["dim"]) % (rank + 1)
        return first + (at <= first)
    if name == "expand":
        return first + len(sizes) - rank
    if name == "repeat":
        at, counts = first + len(sizes) - rank, numbers(node, "repeats")
        return at if counts is not None and counts[at] == 1 else None
    if name == "repeat_interleave":
        dim = arguments(node, ["input", "n", "dim"]).get("dim")
        return first if dim in _but(first, rank) else None
    if name in ("cat", "concat"):
        given = arguments(node, ["tensors", "dim"])
        same = {axes.get(n) for n in given["tensors"]}
        return first if same == {first} and given.get("dim", 0) in _but(first, rank) else None
    if name == "getitem":
        return _indexed(node.args[1], first, rank)
    return None


def _but(axis: int, rank: int) -> list[int]:
    """All dimensions, from both ends, but one."""
    return [d for d in range(-rank, rank) if d % rank != axis]


def _reshaped(before: Sequence[Any], axis: int, after: Sequence[Any]) -> int | None:
    """The one dimension of the same size with as many numbers in front of it.

    Of a single token there may be several: then the one that stays in its place, else the first
    that does not count sequences.
    """
    ahead = prod(before[:axis])
    found = [
        i
        for i, size in enumerate(after)
        if same_size(size, before[axis]) and same_size(prod(after[:i]), ahead)
    ]
    if axis in found:
        return axis
    return next((i for i in found if i), found[0] if found else None)


def _indexed(index: Any, axis: int, rank: int) -> int | None:
    """Where an axis goes that a tensor's index leaves whole."""
    whole = slice(None)
    at, out = 0, 0
    for entry in (*whole_index(index, rank), *[whole] * rank):
        if entry is None:
            out += 1
            continue
        if at == axis:
            return out if entry == whole else None
        at += 1
        if not isinstance(entry, int):
            out += isinstance(entry, slice)
            if not isinstance(entry, slice):
                return None
    return None


def replay(planned: Planned, columns: Sequence[Node], emit: Emitter) -> tuple[Node, Node]:
    """Copy the computation of the site's keys and values, over columns instead of all tokens."""
    site = planned.site
    copies: dict[Node, Node] = {}
    axes: dict[Node, int] = {}
    for node in _needed(site, planned.cache.computed):
        if reason := _follow(node, axes):
            raise PassError(reason)
        if _is_output(node):
            copies[node] = columns[int(node.args[1])]  # type: ignore[arg-type]
        else:
            copies[node] = _copy(node, copies, axes, emit)
    return copies[site.k], copies[site.v]


def _needed(site: Site, computed: Sequence[Node]) -> list[Node]:
    """What of ``computed`` the site's keys and values depend on, writes into it included."""
    wanted: set[Node] = set()
    more = {site.k, site.v}
    while not more <= wanted:
        wanted |= more
        for node in computed:
            writes = op_name(node).endswith("_") and not wanted.isdisjoint(_viewed(node.args[0]))
            if node in wanted or writes:
                more |= {node, *(n for n in node.all_input_nodes if n in computed)}
    return [node for node in computed if node in wanted]


def _viewed(node: Any) -> list[Node]:
    """A tensor and what it is a view of."""
    out = [node]
    while op_name(out[-1]) in VIEWS:
        out.append(out[-1].args[0])
    return out


def _copy(node: Node, copies: dict[Node, Node], axes: dict[Node, int], emit: Emitter) -> Node:
    name = op_name(node)
    inputs = [copies[n] for n in node.all_input_nodes if n in copies]
    if name in RESHAPES | MADE | {"expand"}:
        # Sizes are written out anew: theirs count all tokens.
        axis, sizes = axes[node], list(sizes_of(node))
        source = next(n for n in node.all_input_nodes if n in copies)
        count = emit.size(copies[source], axes[source])
        sizes = [count if i == axis else s for i, s in enumerate(sizes)]
        method = {"expand": "expand"}.get(name, "reshape" if name in RESHAPES else "new_empty")
        return emit(method, inputs[0], *(s if isinstance(s, Node) else int(s) for s in sizes))
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
    return emit(node.target, *args, **kwargs)
