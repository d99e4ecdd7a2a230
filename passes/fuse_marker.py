"""Recognise attention over an ``ArkvCache``: its keys and values are a marker's two outputs.

Does NOT fire when keys and values come from different markers, in the wrong order, or through an
operation that ``peel_gqa`` does not know, or when something else reads them too: the marker then
runs as it stands, in full precision.
"""

from __future__ import annotations

from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import module_path, op_name
from arkv_fx.passes.readers import behind, foreign_reader
from arkv_fx.passes.site import Site
from torch.fx import GraphModule, Node


def run(graph: GraphModule, context: Context) -> None:
    """Set ``source="marker"`` and the new tokens of every site that reads a marker."""
    for site in context.sites:
        _match(site)
    claimed = {site.layer for site in context.sites if site.source == "marker"}
    for node in graph.graph.nodes:
        if op_name(node) == "kv_update" and node.args[3] not in claimed:
            context.sites.append(_unclaimed(node, len(context.sites)))


def _match(site: Site) -> None:
    k_marker, v_marker = _marker(site.k, 0), _marker(site.v, 1)
    marker = k_marker or v_marker or behind(site.k, "kv_update") or behind(site.v, "kv_update")
    if marker is None:
        return
    site.source, site.layer = "marker", marker.args[3]  # type: ignore[assignment]
    if k_marker is None or k_marker is not v_marker:
        site.refuse(
            "keys and values are not the two outputs of one cache update; something between the "
            "cache and the attention changes them"
        )
        return
    reader = foreign_reader(k_marker, [site.node])
    if reader is not None:
        site.refuse(
            f"what the cache returns is also read by {reader.format_node()}; only one attention "
            "can read a compressed cache"
        )
        return
    site.new_k, site.new_v, site.handle = k_marker.args[:3]  # type: ignore[assignment]
    site.cache_nodes = [k_marker]
    if not isinstance(site.layer, int):
        site.refuse("the layer index is not a constant")


def _unclaimed(marker: Node, ordinal: int) -> Site:
    """A site for a cache that no scaled-dot-product attention reads, for the report."""
    site = Site(
        marker, ordinal, module_path(marker), marker, marker, marker, None, False, None,
        source="marker", layer=marker.args[3],  # type: ignore[arg-type]
    )  # fmt: skip
    site.refuse(
        "its cache is not read by scaled_dot_product_attention: load the model with "
        "attn_implementation='sdpa'"
    )
    return site


def _marker(node: Node, output: int) -> Node | None:
    if op_name(node) != "getitem" or node.args[1] != output:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) and op_name(source) == "kv_update" else None
