"""Where the axes of a tensor went: what views, transposes and expansions do to named axes.

A tensor's ``Dims`` say for each of its dimensions which axes of an origin it is made of, outermost
first: after ``x[:, :, None].expand(B, H, G, S, D).reshape(B, H * G, S, D)`` the second dimension is
``(heads, copies)``. Written the other way round (``x.repeat(1, G, 1, 1)``) it is
``(copies, heads)``, so that query heads are never paired with other kv heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from arkv_fx.passes.nodes import (
    arguments,
    example,
    numbers,
    op_name,
    same_size,
    shape,
    sizes_of,
    whole_index,
)
from torch.fx import Node


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis: its name ("0".."3" for those of the origin, "copies" for an expansion) and size."""

    name: str
    size: Any


Dims = tuple[tuple[Axis, ...], ...]
RESHAPES = {"reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "reshape_as"}
SAME = {"contiguous", "clone", "detach", "alias"}
CASTS = {"to", "_to_copy", "type_as", "float", "type"}


VIEWS = RESHAPES | SAME | CASTS | {
    "permute", "transpose", "swapaxes", "swapdims", "unsqueeze", "expand", "expand_as",
    "broadcast_to", "repeat", "repeat_interleave", "getitem", "mT",
}  # fmt: skip


def origin_dims(node: Node) -> Dims:
    """Each dimension of an origin is an axis of its own."""
    return tuple((Axis(str(i), size),) for i, size in enumerate(shape(node) or ()))


def names(dims: Dims) -> tuple[tuple[str, ...], ...]:
    """Names by dimension; axes of size 1 mean nothing and are left out."""
    return tuple(tuple(a.name for a in dim if not same_size(a.size, 1)) for dim in dims)


def size_of(dim: Sequence[Axis]) -> Any:
    """Extent of a dimension."""
    return prod((a.size for a in dim), start=1)


def source_of(node: Node) -> Node | None:
    """The tensor that ``node`` only rearranges, copies along a new axis or casts; None if other."""
    name = op_name(node)
    source = node.args[0] if name in VIEWS and node.args else None
    if not isinstance(source, Node) or shape(source) is None:
        return None
    if name in CASTS and not _widens(source, node):
        return None
    return source


def _widens(source: Node, node: Node) -> bool:
    """Whether a cast keeps every number."""
    before, after = example(source).dtype, example(node).dtype
    return bool(before == after) or (
        before.is_floating_point and after.is_floating_point and after.itemsize > before.itemsize
    )


def advance(node: Node, dims: Dims) -> Dims | None:
    """Dims of ``node``, given those of ``source_of(node)``; None if an axis is cut or mixed."""
    name, sizes = op_name(node), shape(node)
    if sizes is None:
        return None
    if name in SAME | CASTS:
        return dims
    if name in RESHAPES:
        return _regroup(dims, sizes)
    step = _STEPS.get(name)
    return step(node, dims) if step is not None else None


def follow(node: Node, accept: Callable[[Node, Dims], bool]) -> tuple[Node, Dims] | None:
    """The furthest accepted tensor that ``node`` only rearranges, and ``node``'s dims in its axes.

    ``accept(origin, dims)`` says whether an origin will do; None if none of them does.
    """
    path: list[Node] = []
    origins = [node]
    while (source := source_of(node)) is not None:
        path.append(node)
        origins.append(source)
        node = source
    for origin in reversed(origins):
        dims: Dims | None = origin_dims(origin)
        for step in reversed(path):
            dims = advance(step, dims) if dims is not None else None
        if dims is not None and accept(origin, dims):
            return origin, dims
        path = path[:-1]
    return None


def _regroup(dims: Dims, sizes: Sequence[Any]) -> Dims | None:
    """The same axes in the same order, cut into dimensions of other sizes."""
    left = [axis for dim in dims for axis in dim if not same_size(axis.size, 1)]
    ones = [axis for dim in dims for axis in dim if same_size(axis.size, 1)]
    out: list[tuple[Axis, ...]] = []
    for size in sizes:
        if same_size(size, 1):
            out.append((ones.pop(0),) if ones else ())
            continue
        taken: list[Axis] = []
        while left and not (taken and same_size(size_of(taken), size)):
            taken.append(left.pop(0))
        if not same_size(size_of(taken), size):
            return None
        out.append(tuple(taken))
    return tuple(out) if not left else None


def _permute(node: Node, dims: Dims) -> Dims | None:
    order = numbers(node, "dims")
    return tuple(dims[i] for i in order) if order is not None else None


def _transpose(node: Node, dims: Dims) -> Dims | None:
    given = arguments(node, ["input", "dim0", "dim1"])
    first, second = given.get("dim0"), given.get("dim1")
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    out = list(dims)
    out[first], out[second] = out[second], out[first]
    return tuple(out)


def _matrix_transpose(node: Node, dims: Dims) -> Dims:
    return (*dims[:-2], dims[-1], dims[-2])


def _unsqueeze(node: Node, dims: Dims) -> Dims | None:
    dim = arguments(node, ["input", "dim"]).get("dim")
    if not isinstance(dim, int):
        return None
    at = dim % (len(dims) + 1)
    return (*dims[:at], (), *dims[at:])


def _expand(node: Node, dims: Dims) -> Dims | None:
    sizes = sizes_of(node)
    dims = ((),) * (len(sizes) - len(dims)) + dims
    out = []
    for size, dim in zip(sizes, dims, strict=True):
        if same_size(size_of(dim), size):
            out.append(dim)
        elif same_size(size_of(dim), 1):
            out.append((Axis("copies", size),))
        else:
            return None
    return tuple(out)


def _repeat(node: Node, dims: Dims) -> Dims | None:
    """``x.repeat``: whole copies one behind the other."""
    counts = numbers(node, "repeats")
    if counts is None:
        return None
    dims = ((),) * (len(counts) - len(dims)) + dims
    return tuple(
        dim if count == 1 else (Axis("copies", count), *dim)
        for count, dim in zip(counts, dims, strict=True)
    )


def _repeat_interleave(node: Node, dims: Dims) -> Dims | None:
    """Every entry's copies side by side."""
    given = arguments(node, ["input", "repeats", "dim"])
    count, dim = given.get("repeats"), given.get("dim")
    if not isinstance(count, int) or not isinstance(dim, int):
        return None
    out = list(dims)
    out[dim] = (*out[dim], Axis("copies", count))
    return tuple(out)


def _index(node: Node, dims: Dims) -> Dims | None:
    """``x[:, :, None]``: new axes and whole ones only."""
    rest = list(dims)
    out: list[tuple[Axis, ...]] = []
    for entry in whole_index(node.args[1], len(dims)):
        if entry is None:
            out.append(())
        elif entry == slice(None) and rest:
            out.append(rest.pop(0))
        else:
            return None
    return (*out, *rest)


_STEPS = {
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "expand_as": _expand,
    "broadcast_to": _expand,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "getitem": _index,
    "mT": _matrix_transpose,
}
