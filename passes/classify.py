"""Decide which sites are rewritten and give each of the others its reason; plan the fused ones.

Leaves alone: attention without a cache (training, scoring), cross-attention, bidirectional
attention over many new tokens.
"""

from __future__ import annotations

import re

import torch
from arkv_fx.passes.context import Context
from arkv_fx.passes.heads import mask_reason
from arkv_fx.passes.nodes import example, same_size, shape
from arkv_fx.passes.site import Site
from torch.fx import GraphModule

from arkv_fx.plan import plan_layer


def run(graph: GraphModule, context: Context) -> None:
    """Set ``plan`` on every site that will be rewritten and ``reason`` on every other."""
    _number_layers(context.sites)
    for site in context.sites:
        if site.source and (site.source, site.layer) in context.left_alone:
            site.refuse("it was left alone in an earlier graph, so its tokens are not in our state")
        if site.source and site.layer is not None and site.layer in context.whole:
            site.refuse(context.whole[site.layer])
        if not site.reason:
            _decide(site, context)
    alone = {s.cache_key: s for s in context.sites if s.source and s.reason}
    for site in context.fused:
        if other := alone.get(site.cache_key):
            site.refuse(f"another attention over its cache was left alone: {other.reason}")


def _number_layers(sites: list[Site]) -> None:
    """Number absorbed caches by the last number in their modules' paths, or as they come."""
    absorbed = [site for site in sites if site.source in ("cat", "buffer")]
    numbers = [re.findall(r"\d+", site.path)[-1:] for site in absorbed]
    unique = all(numbers) and len({n[0] for n in numbers}) == len(numbers)
    for site, number in zip(absorbed, numbers, strict=True):
        site.layer = int(number[0]) if unique else site.ordinal


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
    if reason := mask_reason(site):
        site.refuse(reason)
        return
    tokens = q[-2]
    many = not (isinstance(tokens, int) and tokens == 1)
    # Where we insert the state, new tokens are causal among themselves whatever came before.
    causal = site.is_causal and (site.fresh or site.source == "insert")
    if many and not site.biases and not causal and not site.partial:
        site.refuse(
            "many new tokens without a mask and not causal from an empty cache: bidirectional "
            "attention, or causal attention aligned to the first key"
        )
        return
    if site.partial and (site.last or (many and not site.biases)):
        site.refuse(f"{tokens} queries for {k[2]} new keys: not self-attention over new tokens")
        return
    # Extents of the state are numbers: a symbolic batch is specialised here, one graph each.
    site.batch, site.heads = int(k[0]), int(k[1])
    # What is computed from the cache may mix heads, so all heads of a token are kept together.
    folded = site.heads if site.computed else 1
    if site.layer is not None and site.layer < len(context.sliding):
        site.sliding = context.sliding[site.layer]
    found = context.calibration.row(site.layer) if context.calibration is not None else None
    site.plan = plan_layer(
        context.config,
        heads=site.heads // folded,
        k_dim=int(k[3]) * folded,
        v_dim=int(v[3]) * folded,
        dtype=example(site.new_k).dtype,
        sliding=site.sliding,
        oq_ratio=found.oq_ratio if found else None,
        share=found.share if found else 1.0,
        where=f"layer {site.layer} ({site.path})",
    )


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
