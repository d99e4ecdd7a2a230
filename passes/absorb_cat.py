"""Recognise attention over past tensors that a model concatenates itself.

``K = cat([past_k, k], -2)`` with ``past_k`` a graph input (or an empty tensor: the first call),
the same for values. The new cache value that the graph returns becomes a zero-memory tensor of
the right shape whose storage is the key to our state. Does NOT fire when the past or the joined
tensor is used by anything but this attention, shape queries and the graph's output, since that
use would read nothing.
"""

from __future__ import annotations

import re

from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import op_name, shape
from arkv_fx.passes.readers import foreign_reader
from arkv_fx.passes.site import Site
from torch.fx import GraphModule, Node


def run(graph: GraphModule, context: Context) -> None:
    """Set ``source="cat"`` and the new tokens of every site whose cache can be absorbed."""
    for site in context.sites:
        if not site.source:
            _match(site)


def _match(site: Site) -> None:
    keys, values = _past_and_new(site.k), _past_and_new(site.v)
    if keys is None and values is None:
        return
    if keys is None or values is None:
        site.refuse("only one of keys and values is concatenated with its past")
        return
    (past_k, new_k, fresh), (past_v, new_v, fresh_v) = keys, values
    if fresh != fresh_v:
        site.refuse("keys have a past and values have none, or the reverse")
        return
    readers = [foreign_reader(x, site.products, output=True) for x in (site.k, site.v)]
    readers += [
        # One empty tensor may be the past of both.
        foreign_reader(past, [site.k, site.v] if past_k is past_v else [joined])
        for past, joined in ((past_k, site.k), (past_v, site.v))
        if past is not None
    ]
    for reader in readers:
        if reader is not None:
            site.refuse(
                f"the cache is also read by {reader.format_node()}, which cannot see compressed "
                "tokens; pass an ArkvCache instead"
            )
            return
    site.source, site.fresh = "cat", fresh
    site.new_k, site.new_v, site.past = new_k, new_v, (past_k, past_v)
    site.cache_nodes = [site.k, site.v]
    numbers = re.findall(r"\d+", site.path)
    site.layer = int(numbers[-1]) if numbers else site.ordinal
    site.sliding = _sliding_window(site.k)


def _past_and_new(node: Node) -> tuple[Node | None, Node, bool] | None:
    """(past, new, past is empty) if ``node`` is cat([past, new]) along tokens."""
    if op_name(node) != "cat":
        return None
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, list | tuple) or len(parts) != 2 or dim not in (-2, 2):
        return None
    past, new = parts
    if not isinstance(past, Node) or not isinstance(new, Node) or len(shape(new) or ()) != 4:
        return None
    past_shape = shape(past)
    if past_shape == (0,):
        return None, new, True
    if past.op != "placeholder":
        return None
    length = past_shape[-2] if past_shape is not None else None
    return past, new, isinstance(length, int) and length == 0


def _sliding_window(joined: Node) -> int:
    """w if the cache keeps only the last w - 1 tokens: ``joined[:, :, -w + 1 :, :]``."""
    for user in joined.users:
        if op_name(user) == "getitem" and isinstance(user.args[1], tuple) and len(user.args[1]) > 2:
            cut = user.args[1][2]
            if isinstance(cut, slice) and isinstance(cut.start, int) and cut.start < 0:
                return 1 - cut.start
    return 0
