"""Decide which sites are rewritten and give each of the others its reason; plan the fused ones.

Leaves alone: attention without a cache (training, scoring), cross-attention, bidirectional
attention over many new tokens.
"""

from __future__ import annotations

import re

import torch
from arkv_fx.passes.autocast import attended
from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.heads import mask_reason
from arkv_fx.passes.nodes import example, sizes_of
from arkv_fx.passes.sites import Cache, Cat, Inserted, Marker, Planned, Site
from torch.fx import GraphModule

from arkv_fx.plan import plan_calibrated


def run(graph: GraphModule, context: Context) -> int:
    """Set ``planned`` on every site that will be rewritten and ``reason`` on every other."""
    _number_layers(context.sites)
    for site in context.sites:
        if site.source and (site.source, site.layer) in context.left_alone:
            site.refuse("it was left alone in an earlier graph, so its tokens are not in our state")
        if site.source and site.layer is not None and site.layer in context.whole:
            site.refuse(context.whole[site.layer])
        if not site.reason:
            _decide(site, context)
    alone = {s.cache_key: s for s in context.sites if s.source and s.reason}
    for planned in context.fused:
        if other := alone.get(planned.site.cache_key):
            planned.site.refuse(f"another attention over its cache was left alone: {other.reason}")
    return len(context.fused)


PASS = Pass("classify", run, needs=("sites", "caches", "insertions"), gives=("plans",))


def _number_layers(sites: list[Site]) -> None:
    """Number absorbed caches by the last number in their modules' paths, or as they come."""
    absorbed = [site for site in sites if site.source in ("cat", "buffer")]
    numbers = [re.findall(r"\d+", site.path)[-1:] for site in absorbed]
    unique = all(numbers) and len({n[0] for n in numbers}) == len(numbers)
    for site, number in zip(absorbed, numbers, strict=True):
        site.layer = int(number[0]) if unique else site.ordinal


def _decide(site: Site, context: Context) -> None:
    cache = site.cache
    if cache is None:
        site.refuse(
            "no cache: its keys and values come from this call alone (scoring, training, an "
            "encoder or cross-attention)"
        )
        return
    q, k, v = sizes_of(site.q), sizes_of(cache.new_k), sizes_of(cache.new_v)
    if isinstance(cache, Cat) and torch.is_grad_enabled() and _wants_grad(site, cache):
        site.refuse(
            "gradients are wanted, and a cache is not differentiated: use torch.no_grad()",
            lasting=False,
        )
        return
    if len(k) != 4 or len(v) != 4:
        site.refuse(f"cached keys have shape {k}, not [batch, kv heads, tokens, head dim]")
        return
    if reason := mask_reason(site):
        site.refuse(reason)
        return
    tokens = q[-2]
    many = not (isinstance(tokens, int) and tokens == 1)
    # Where we insert the state, new tokens are causal among themselves whatever came before.
    causal = isinstance(cache, Inserted) or (site.is_causal and cache.fresh)
    if many and not site.biases and not causal and not site.partial:
        site.refuse(
            "many new tokens without a mask and not causal from an empty cache: bidirectional "
            "attention, or causal attention aligned to the first key"
        )
        return
    if site.partial and (cache.last or (many and not site.biases)):
        site.refuse(f"{tokens} queries for {k[2]} new keys: not self-attention over new tokens")
        return
    # Extents of the state are numbers: a symbolic batch is specialised here, one graph each.
    batch, heads = int(k[0]), int(k[1])
    # What is computed from the cache may mix heads, so all heads of a token are kept together.
    folded = heads if cache.computed else 1
    layer = site.ordinal if site.layer is None else site.layer
    sliding = context.sliding[layer] if layer < len(context.sliding) else cache.sliding
    # Nor is it asked for channels of what is cached, but of what is computed.
    config = context.config.replace(balance=False) if cache.computed else context.config
    plan = plan_calibrated(
        config,
        context.calibration,
        layer,
        context.sliding,
        heads=heads // folded,
        k_dim=int(k[3]) * folded,
        v_dim=int(v[3]) * folded,
        dtype=attended(site, cache),
        sliding=sliding,
        # A model's own cache goes on whatever we say of its length.
        positions=context.positions if isinstance(cache, Marker) else None,
    )
    site.planned = Planned(site, cache, plan, layer, batch, heads)


def _wants_grad(site: Site, cache: Cache) -> bool:
    values = [example(n) for n in (site.q, cache.new_k, cache.new_v)]
    return any(v is not None and v.requires_grad for v in values)
