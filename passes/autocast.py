"""In which dtype an attention computes where ``torch.autocast`` is on.

Autocast lowers an attention's inputs as it calls it, whatever is cached; so what is cached may be
lowered as well, and the attention gives the same numbers.
"""

from __future__ import annotations

import torch
from arkv_fx.passes.nodes import example
from arkv_fx.passes.sites import Cache, Site
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast, is_autocast_available
from torch.fx import Node


def attended(site: Site, cache: Cache) -> torch.dtype:
    """The dtype in which a site reads its keys and values: theirs, or what autocast makes it."""
    made, keys = example(site.node), example(cache.new_k)
    lowered = made.dtype == _lowered(site.node, keys.device.type)
    dtype: torch.dtype = made.dtype if lowered else keys.dtype
    return dtype


def _lowered(node: Node, device: str) -> torch.dtype | None:
    """The dtype of autocast where ``node`` runs, None where it is off.

    It may be on around the whole graph, and be switched within.
    """
    if not is_autocast_available(device):
        return None
    on = torch.is_autocast_enabled(device)
    state = torch.get_autocast_dtype(device) if on else None
    before: dict[Node, torch.dtype | None] = {}
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is _enter_autocast and other.args[0] == device:
            before[other] = state
            _, dtype, enabled, *_ = other.args
            state = (dtype or torch.get_autocast_dtype(device)) if enabled else None
        elif other.target is _exit_autocast and other.args[0] in before:
            state = before[other.args[0]]
    return state
