"""Recognise attention over a static buffer into which the model writes its new tokens.

``cache[:, :, pos] = k``, ``cache[:, :, start : start + T] = k``, ``index_copy_`` or ``index_put_``
into a buffer or graph input [B, H, S, D] or [B, S, H, D], which the attention then reads, whole
under a mask or as far as it is filled. Does NOT fire when the buffer is read by anything else,
written twice, or written at positions that are computed in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arkv_fx.passes.absorb_cat import turned, unturned
from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.layout import VIEWS
from arkv_fx.passes.nodes import (
    arguments,
    example,
    op_name,
    rank_of,
    same_size,
    shape,
    sizes_of,
    whole_index,
)
from arkv_fx.passes.readers import foreign_reader
from arkv_fx.passes.sites import Buffer, Site
from torch.fx import GraphModule, Node

WRITES = {"setitem", "index_copy_", "index_put_", "copy_"}


@dataclass
class _Write:
    """One write of new tokens: the node, what is written, along which dimension, and where."""

    node: Node
    new: Node
    dim: int
    start: Node | int = 0
    positions: Node | None = None


class _NotAbsorbedError(Exception):
    """A buffer is written to, but not in a way that can be followed; the message says why."""


def run(graph: GraphModule, context: Context) -> int:
    """Give every site whose buffer can be absorbed its ``Buffer``."""
    matches = 0
    for site in context.sites:
        if site.source:
            continue
        try:
            cache = _match(site, context.first)
        except _NotAbsorbedError as error:
            site.source = "buffer"
            site.refuse(str(error))
            continue
        if cache is not None:
            site.keep(cache)
            matches += 1
    return matches


PASS = Pass("absorb_buffer", run, needs=("sites", "markers"), gives=("caches",))


def _match(site: Site, first: bool) -> Buffer | None:
    (read_k, dim), (read_v, dim_v) = unturned(site.k), unturned(site.v)
    base_k, base_v = _base(read_k), _base(read_v)
    writes_k, writes_v = _writes(base_k), _writes(base_v)
    if not writes_k and not writes_v:
        return None
    if len(writes_k) != 1 or len(writes_v) != 1 or base_k is base_v:
        raise _NotAbsorbedError("keys and values are not two buffers that are each written once")
    keys, values = (
        _read_along(dim, dim_v, _parse(write, base), base)
        for write, base in ((writes_k[0], base_k), (writes_v[0], base_v))
    )
    if (keys.start, keys.positions) != (values.start, values.positions):
        raise _NotAbsorbedError("keys and values are written at different positions")
    for base, write in ((base_k, keys), (base_v, values)):
        for held in (base, write.node):
            reader = foreign_reader(held, [*site.products, write.node, *_aims(write.node)])
            if reader is not None:
                raise _NotAbsorbedError(
                    f"the cache is also read by {reader.format_node()}, which cannot see "
                    "compressed tokens"
                )
    if not site.biases and not _ends_at_newest(read_k, dim, keys):
        raise _NotAbsorbedError(
            "without a mask it attends to places of the buffer that nothing is written to"
        )
    return Buffer(
        new_k=turned(keys.new, dim),
        new_v=turned(values.new, dim),
        fresh=first or (keys.start == 0 and keys.positions is None),
        nodes=[keys.node, values.node, *_aims(keys.node), *_aims(values.node)],
        token_dim=dim,
        past=(base_k, base_v),
        start=keys.start,
        positions=keys.positions,
    )


def _read_along(dim_k: int, dim_v: int, write: _Write, base: Node) -> _Write:
    """A write that fits its buffer, and the dimension along which keys and values are read."""
    if (write.dim, dim_v) != (dim_k, dim_k):
        raise _NotAbsorbedError(
            "the buffer is written along another dimension than it is read along"
        )
    if reason := _misfit(write, base):
        raise _NotAbsorbedError(reason)
    return write


def _base(node: Node) -> Node:
    """The buffer that ``node`` reads the front of, or the node itself."""
    while True:
        name = op_name(node)
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            return node
        if name in WRITES and name != "setitem":
            node = source
        elif name == "getitem" and _fronts(node.args[1]):
            node = source
        elif name == "slice" and (arguments(node, ["x", "dim", "start"]).get("start") or 0) == 0:
            node = source
        else:
            return node


def _fronts(index: Any) -> bool:
    """``[:b, :, :end]``: from the first entry on in every dimension."""
    index = index if isinstance(index, tuple) else (index,)
    return all(
        isinstance(i, slice) and (i.start or 0) == 0 and i.step in (None, 1)
        for i in index
        if i is not Ellipsis
    )


def _writes(base: Node) -> list[Node]:
    """All in-place writes to a graph input, directly or through views of it."""
    if base.op not in ("placeholder", "get_attr") or rank_of(base) != 4:
        return []
    todo, found, seen = [base], dict[Node, None](), {base}
    while todo:
        current = todo.pop()
        for user in current.users:
            name = op_name(user)
            if name in WRITES and user.args[0] is current:
                found[user] = None
            elif name.endswith("_") and not name.startswith("_") and user.args[:1] == (current,):
                found[user] = None  # an unknown write is counted, and then refused
            if (name in VIEWS | {"slice"} or user in found) and user not in seen:
                seen.add(user)
                todo.append(user)
    return list(found)


def _aims(write: Node) -> list[Node]:
    """The view that ``copy_`` writes to."""
    target = write.args[0]
    return [target] if op_name(write) == "copy_" and isinstance(target, Node) else []


def _parse(write: Node, base: Node) -> _Write:
    """What is written where."""
    name, unknown = op_name(write), f"the cache is written by {write.format_node()}, which"
    index: Any
    if name == "setitem":
        target, index, new = write.args[0], write.args[1], write.args[2]
    elif name == "copy_":
        view = write.args[0]
        if not isinstance(view, Node) or op_name(view) != "getitem":
            raise _NotAbsorbedError(f"{unknown} writes to an unknown part of it")
        target, index, new = view.args[0], view.args[1], write.args[1]
    elif name == "index_copy_":
        given = arguments(write, ["x", "dim", "index", "source"])
        target, new = given["x"], given["source"]
        index = tuple([slice(None)] * (given["dim"] % 4) + [given["index"]])
    elif name == "index_put_":
        given = arguments(write, ["x", "indices", "values", "accumulate"])
        target, new = given["x"], given["values"]
        index = tuple(slice(None) if i is None else i for i in given["indices"])
        if given.get("accumulate"):
            raise _NotAbsorbedError(f"{unknown} adds to what is there")
    else:
        raise _NotAbsorbedError(f"{unknown} is not known to store new tokens")
    if target is not base or not isinstance(new, Node):
        raise _NotAbsorbedError(f"{unknown} writes to an unknown part of it")
    return _place(write, new, index, unknown)


def _place(node: Node, new: Node, index: Any, unknown: str) -> _Write:
    found = None
    for dim, entry in enumerate(whole_index(index, 4)):
        if isinstance(entry, slice) and (entry.start or 0) == 0 and entry.step in (None, 1):
            if entry.stop is None or dim == 0:
                continue
        if found is not None or dim not in (1, 2):
            raise _NotAbsorbedError(f"{unknown} picks more than positions")
        if isinstance(entry, slice) and entry.step in (None, 1):
            start = entry.start or 0
            if isinstance(start, Node) and start.op != "placeholder":
                raise _NotAbsorbedError(f"{unknown} computes in the graph where to write")
            found = _Write(node, new, dim, start=start)
        elif isinstance(entry, Node) and rank_of(entry) == 1:
            if entry.op != "placeholder":
                raise _NotAbsorbedError(f"{unknown} computes in the graph where to write")
            found = _Write(node, new, dim, positions=entry)
        else:
            raise _NotAbsorbedError(f"{unknown} writes at a place of unknown form")
    if found is None:
        raise _NotAbsorbedError(f"{unknown} overwrites all of it")
    return found


def _misfit(write: _Write, base: Node) -> str:
    new, held = shape(write.new), shape(base)
    if new is None or held is None or len(new) != 4:
        return f"new keys or values have shape {new}, not four dimensions"
    others = [i for i in (1, 2, 3) if i != write.dim]
    if not all(same_size(new[i], held[i]) for i in others):
        return f"new keys or values {[*new]} are broadcast into the buffer {[*held]}"
    index = shape(write.positions) if write.positions is not None else None
    if index is not None and not same_size(index[0], new[write.dim]):
        return f"{new[write.dim]} new tokens are written at {index[0]} positions"
    kept, came = example(base).dtype, example(write.new).dtype
    if kept != came or not kept.is_floating_point:
        return f"the buffer stores {came} as {kept}"
    return ""


def _ends_at_newest(read: Node, dim: int, write: _Write) -> bool:
    """Whether the attention reads just what has been written."""
    if write.positions is not None:
        return False
    start = example(write.start) if isinstance(write.start, Node) else write.start
    return same_size(sizes_of(read)[dim], start + sizes_of(write.new)[write.dim])
