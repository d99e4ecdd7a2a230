"""Recognise attention over an ``ArkvCache``: its keys and values come from a marker's two outputs.

They are these outputs themselves, or made of them token by token (``carry``): latents expanded to
heads, values split for two attentions. Several attentions may read one cache. Does NOT fire when
something else reads it too: the marker then runs as it stands, in full precision.
"""

from __future__ import annotations

from arkv_fx.passes import carry
from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import module_path, op_name
from arkv_fx.passes.readers import foreign_reader
from arkv_fx.passes.site import Site
from torch.fx import GraphModule, Node


def run(graph: GraphModule, context: Context) -> None:
    """Set ``source="marker"`` and the new tokens of every site that reads a marker."""
    markers = [node for node in graph.graph.nodes if op_name(node) == "kv_update"]
    made: dict[Node, list[Node]] = {}
    if not all(_is_direct(site) for site in context.sites):  # it takes a look at the whole graph
        made = {marker: carry.made_of(marker, context.products) for marker in markers}
    for site in context.sites:
        marker = _marker_behind(site, made)
        if marker is not None:
            _match(site, marker, made, context)
    groups: dict[Node, list[Site]] = {}
    for site in context.sites:
        if site.source == "marker":
            groups.setdefault(site.cache_nodes[0], []).append(site)
    for marker, sites in groups.items():
        _check_readers(marker, sites, context)
    for marker in markers:
        if marker not in groups:
            context.sites.append(_unclaimed(marker, len(context.sites)))


def _is_direct(site: Site) -> bool:
    """Whether keys and values are the two outputs of one marker."""
    marker = _marker(site.k, 0)
    return marker is not None and _marker(site.v, 1) is marker


def _marker_behind(site: Site, made: dict[Node, list[Node]]) -> Node | None:
    """The last marker that keys or values are made of."""
    direct = _marker(site.k, 0) or _marker(site.v, 1)
    found = [m for m, nodes in made.items() if site.k in nodes or site.v in nodes]
    return direct or (found[-1] if found else None)


def _match(site: Site, marker: Node, made: dict[Node, list[Node]], context: Context) -> None:
    site.source, site.cache_nodes = "marker", [marker]
    site.new_k, site.new_v, site.handle, site.layer = marker.args[:4]  # type: ignore[assignment]
    if not isinstance(site.layer, int):
        site.refuse("the layer index is not a constant")
    if _is_direct(site):
        return
    site.computed = made[marker]
    if context.stand_in is not None:
        site.refuse("layers whose keys are computed from what is cached are not measured alone")
        return
    if reason := carry.obstacle(site):
        site.refuse(reason)


def _check_readers(marker: Node, sites: list[Site], context: Context) -> None:
    """One of the attentions updates the state behind all of them; nothing else reads the cache."""
    allowed = [node for site in sites for node in site.products]
    computed = next((site.computed for site in sites if site.computed), [])
    for site in sites:  # one state, so one way to keep it
        site.computed = computed
    reader = foreign_reader(marker, [*computed, *allowed])
    for site in sites:
        if reader is not None:
            site.refuse(
                f"what the cache returns is also read by {reader.format_node()}; only attention "
                "can read a compressed cache"
            )
        if context.stand_in is not None and len(sites) > 1:
            site.refuse("layers that share a cache are not measured alone")
        site.last = False
    updating = next((site for site in reversed(sites) if not site.partial), sites[-1])
    updating.last = True
    updating.behind = sites[-1] if updating is not sites[-1] else None


def _unclaimed(marker: Node, ordinal: int) -> Site:
    """A site for a cache that no attention reads, for the report."""
    site = Site(
        marker, ordinal, module_path(marker), marker, marker, marker, source="marker",
        layer=marker.args[3], cache_nodes=[marker],  # type: ignore[arg-type]
    )  # fmt: skip
    site.refuse(
        "no attention was recognised behind its cache: neither scaled_dot_product_attention nor "
        "softmax(q @ k) @ v"
    )
    return site


def _marker(node: Node, output: int) -> Node | None:
    if op_name(node) != "getitem" or node.args[1] != output:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) and op_name(source) == "kv_update" else None
