"""The passes in order: the one list that transform, torch.compile and export share."""

from __future__ import annotations

import copy
from collections.abc import Callable

from arkv_fx.passes import (
    absorb_buffer,
    absorb_cat,
    classify,
    find_flex,
    find_sdpa,
    find_softmax,
    fuse_marker,
    grow_masks,
    insert_state,
    rewrite,
    shift_positions,
    verify,
)
from arkv_fx.passes.context import Context
from torch.fx import GraphModule

Pass = Callable[[GraphModule, Context], None]

PASSES: tuple[Pass, ...] = (
    find_sdpa.run,
    find_softmax.run,
    find_flex.run,
    fuse_marker.run,
    absorb_cat.run,
    absorb_buffer.run,
    insert_state.run,
    classify.run,
    rewrite.run,
    grow_masks.run,
    shift_positions.run,
    verify.run,
)


def apply(graph: GraphModule, context: Context) -> GraphModule:
    """Run all passes on a copy: the tracer's graph must not change under it.

    Raises:
        PassError: if a rewrite went wrong.
        ConfigError: if a layer cannot be planned under the configuration.
    """
    # A shallow copy shares parameters and submodules; only the graph is new.
    work = GraphModule(graph, copy.deepcopy(graph.graph))
    for step in PASSES:
        step(work, context)
    work.recompile()
    return work
