"""Decide which sites are rewritten and give each of the others its reason; plan the fused ones.

Leaves alone: attention without a cache (training, scoring), cross-attention, bidirectional
attention over many new tokens.
"""

from __future__ import annotations

import torch
from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import example, same_size, shape
from arkv_fx.passes.site import Site
from torch.fx import GraphModule

from arkv_fx.plan import plan_layer


def run(graph: GraphModule, context: Context) -> None:
    """Set ``plan`` on every site that will be rewritten and ``reason`` on every other."""
    for site in context.sites:
        if site.source and (site.source, site.layer) in context.left_alone:
            site.refuse("it was left alone in an earlier graph, so its tokens are not in our state")
        if site.mask is not None and not _mask_fits(site):
            site.refuse(
                f"mask has shape {shape(site.mask)}, not [batch, heads, queries, keys] without "
                "broadcasting over queries or keys"
            )
        if not site.reason:
            _decide(site, context)


def _decide(site: Site, context: Context) -> None:
    if not site.source or site.new_k is None or site.new_v is None:
        site.refuse(
            "no cache: its keys and values come from this call alone (scoring, training, an "
            "encoder or cross-attention)"
        )
        return
    q, k, v = shape(site.q), shape(site.new_k), shape(site.new_v)
    assert q is not None and k is not None and v is not None
    if site.source == "cat" and torch.is_grad_enabled() and _wants_grad(site):
        site.refuse(
            "gradients are wanted, and a cache is not differentiated: use torch.no_grad()",
            lasting=False,
        )
        return
    if len(k) != 4 or len(v) != 4:
        site.refuse(f"cached keys have shape {k}, not [batch, kv heads, tokens, head dim]")
        return
    if site.source == "marker":
        site.fresh = _is_first_call(site)
    many = not (isinstance(q[2], int) and q[2] == 1)
    # Where we insert the state, new tokens are causal among themselves whatever came before.
    causal = site.is_causal and (site.fresh or site.source == "insert")
    if many and site.mask is None and not causal:
        site.refuse(
            "many new tokens without a mask and not causal from an empty cache: bidirectional "
            "attention, or causal attention aligned to the first key"
        )
        return
    if not same_size(q[2], k[2]):
        site.refuse(f"{q[2]} queries for {k[2]} new keys: not self-attention over new tokens")
        return
    # Extents of the state are numbers: a symbolic batch is specialised here, one graph each.
    site.batch, site.heads = int(k[0]), int(k[1])
    if int(q[1]) % site.heads:
        site.refuse(f"{q[1]} query heads are not a multiple of {k[1]} kv heads")
        return
    if site.layer is not None and site.layer < len(context.sliding):
        site.sliding = context.sliding[site.layer]
    found = context.calibration.row(site.layer) if context.calibration is not None else None
    site.plan = plan_layer(
        context.config,
        heads=site.heads,
        k_dim=int(k[3]),
        v_dim=int(v[3]),
        dtype=example(site.new_k).dtype,
        sliding=site.sliding,
        oq_ratio=found.oq_ratio if found else None,
        share=found.share if found else 1.0,
        where=f"layer {site.layer} ({site.path})",
    )


def _mask_fits(site: Site) -> bool:
    mask, queries, keys = shape(site.mask), shape(site.q), shape(site.k)
    if mask is None or queries is None or keys is None or len(mask) != 4:
        return False
    return same_size(mask[2], queries[2]) and same_size(mask[3], keys[2])


def _wants_grad(site: Site) -> bool:
    values = [example(n) for n in (site.q, site.new_k, site.new_v)]
    return any(v is not None and v.requires_grad for v in values)


def _is_first_call(site: Site) -> bool:
    """The marker's total equals its new tokens: nothing was cached before."""
    marker = site.cache_nodes[0]
    total = marker.args[4]
    length = (shape(site.new_k) or (0, 0, 0))[2]
    value = example(total) if hasattr(total, "meta") else total
    return same_size(value, length)
