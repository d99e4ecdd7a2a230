"""Recognise attention over an ``ArkvCache``: its keys and values come from a marker's two outputs.

They are these outputs themselves, or made of them token by token (``carry``): latents expanded to
heads, values split for two attentions. Several attentions may read one cache. Does NOT fire when
something else reads it too: the marker then runs as it stands, in full precision.
"""

from __future__ import annotations

from typing import Any

from arkv_fx.passes import carry
from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.nodes import example, module_path, op_name, same_size, shape
from arkv_fx.passes.readers import foreign_reader
from arkv_fx.passes.sites import Marker, Site
from torch.fx import GraphModule, Node


def run(graph: GraphModule, context: Context) -> int:
    """Give every site that reads a marker its ``Marker``."""
    markers = [node for node in graph.graph.nodes if op_name(node) == "kv_update"]
    made: dict[Node, list[Node]] = {}
    if not all(_is_direct(site) for site in context.sites):  # it takes a look at the whole graph
        made = {marker: carry.made_of(marker, context.products) for marker in markers}
    groups: dict[Node, list[tuple[Site, Marker]]] = {}
    for site in context.sites:
        marker = _marker_behind(site, made)
        if marker is not None:
            cache = _match(site, marker, made, context)
            groups.setdefault(marker, []).append((site, cache))
    for marker, readers in groups.items():
        _share(marker, readers, context)
    for marker in markers:
        if marker not in groups:
            context.sites.append(_unclaimed(marker, len(context.sites)))
    return sum(map(len, groups.values()))


PASS = Pass("fuse_marker", run, needs=("sites",), gives=("markers", "caches"))


def _is_direct(site: Site) -> bool:
    """Whether keys and values are the two outputs of one marker."""
    marker = _marker(site.k, 0)
    return marker is not None and _marker(site.v, 1) is marker


def _marker_behind(site: Site, made: dict[Node, list[Node]]) -> Node | None:
    """The last marker that keys or values are made of."""
    direct = _marker(site.k, 0) or _marker(site.v, 1)
    found = [m for m, nodes in made.items() if site.k in nodes or site.v in nodes]
    return direct or (found[-1] if found else None)


def _match(site: Site, marker: Node, made: dict[Node, list[Node]], context: Context) -> Marker:
    given: Any = marker.args
    k, v, handle, _, total = given
    new, held = shape(k), total if example(total) is None else example(total)
    fresh = new is not None and len(new) == 4 and same_size(held, new[2])  # nothing was cached
    cache = Marker(new_k=k, new_v=v, fresh=fresh, nodes=[marker], handle=handle)
    site.keep(cache)
    site.layer = _layer(marker)
    if site.layer is None:
        site.refuse("the layer index is not a constant")
    if _is_direct(site):
        return cache
    cache.computed = made[marker]
    if context.stand_in is not None:
        site.refuse("layers whose keys are computed from what is cached are not measured alone")
    elif reason := carry.obstacle(site, cache):
        site.refuse(reason)
    return cache


def _share(marker: Node, readers: list[tuple[Site, Marker]], context: Context) -> None:
    """One of the attentions updates the state behind all of them; nothing else reads the cache."""
    sites, caches = zip(*readers, strict=True)
    allowed = [node for site in sites for node in site.products]
    computed: list[Node] = next((cache.computed for cache in caches if cache.computed), [])
    reader = foreign_reader(marker, [*computed, *allowed])
    for site in sites:
        if reader is not None:
            site.refuse(
                f"what the cache returns is also read by {reader.format_node()}; only attention "
                "can read a compressed cache"
            )
        if context.stand_in is not None and len(sites) > 1:
            site.refuse("layers that share a cache are not measured alone")
    whole = [i for i, site in enumerate(sites) if not site.partial]
    updating = whole[-1] if whole else len(sites) - 1
    for i, cache in enumerate(caches):
        cache.computed, cache.last = computed, i == updating  # one state, so one way to keep it
    if updating < len(sites) - 1:
        caches[updating].behind = sites[-1].node


def _unclaimed(marker: Node, ordinal: int) -> Site:
    """A site for a cache that no attention reads, for the report."""
    site = Site(
        marker, ordinal, module_path(marker), marker, marker, marker, source="marker",
        layer=_layer(marker),
    )  # fmt: skip
    site.refuse(
        "no attention was recognised behind its cache: neither scaled_dot_product_attention nor "
        "softmax(q @ k) @ v"
    )
    return site


def _layer(marker: Node) -> int | None:
    layer = marker.args[3]
    return layer if isinstance(layer, int) else None


def _marker(node: Node, output: int) -> Node | None:
    if op_name(node) != "getitem" or node.args[1] != output:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) and op_name(source) == "kv_update" else None
