"""What the inputs that the passes add to a graph are: a record on each, which copies keep."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch import Tensor
from torch.fx import GraphModule, Node

KEY = "arkv_role"


@dataclass(frozen=True)
class Role:
    """What an added input is.

    Of a cache, known by the ordinal of its first site: a tensor of the layer's ``state``, called
    ``name`` as in ``LayerPlan.specs``; the ``anchor`` behind what its model takes for the cache;
    or the position where a buffer is written from, its ``start``, int64. Of the whole graph, with
    no cache: the ``offset``, int64, the number of tokens before the call.
    """

    kind: Literal["state", "anchor", "start", "offset"]
    cache: int | None = None
    name: str = ""


def add_input(graph: GraphModule, role: Role, example: Tensor | None = None) -> Node:
    """A new input behind all others; ``example`` is a fake of it."""
    parts = ("arkv", role.kind, role.cache, role.name.replace(".", "_"))
    name = "_".join(str(part) for part in parts if part not in (None, ""))
    last = list(graph.graph.find_nodes(op="placeholder"))[-1:]
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_after(last[0]) if last else graph.graph.inserting_before(first):
        node = graph.graph.placeholder(name)
    node.meta = {KEY: role} if example is None else {KEY: role, "example_value": example}
    return node


def role_of(node: Node) -> Role | None:
    """The role of an added input, None for all other nodes."""
    return node.meta.get(KEY)


def is_added(node: Node, kind: str) -> bool:
    """Whether the node is an added input of this kind."""
    role = role_of(node)
    return role is not None and role.kind == kind


def added(graph: GraphModule, kind: str) -> list[Node]:
    """The added inputs of one kind, in order."""
    return [n for n in graph.graph.find_nodes(op="placeholder") if is_added(n, kind)]


def added_in_order(graph: GraphModule) -> list[tuple[str, int | None]]:
    """Kind and cache of all added inputs in order; the state of a cache counts once.

    Whoever calls the graph gives, for a state, its tensors in the order of ``LayerPlan.specs``.
    """
    roles = (role_of(node) for node in graph.graph.find_nodes(op="placeholder"))
    return [key for key, _ in groupby((r.kind, r.cache) for r in roles if r is not None)]


def kept(node: Node) -> dict[str, Any]:
    """The part of a node's ``meta`` that must outlive new example values."""
    return {KEY: node.meta[KEY]} if KEY in node.meta else {}
