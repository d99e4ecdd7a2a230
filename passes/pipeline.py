"""The passes in order: the one list that transform, torch.compile and export share.

What they did is in ``context.trace``.
"""

from __future__ import annotations

import copy
from time import perf_counter

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
from arkv_fx.passes.context import Applied, Context
from arkv_fx.passes.contract import in_order
from torch.fx import GraphModule

PASSES = in_order(
    find_sdpa.PASS,
    find_softmax.PASS,
    find_flex.PASS,
    fuse_marker.PASS,
    absorb_cat.PASS,
    absorb_buffer.PASS,
    insert_state.PASS,
    classify.PASS,
    rewrite.PASS,
    grow_masks.PASS,
    shift_positions.PASS,
    verify.PASS,
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
        start = perf_counter()
        matches = step.run(work, context)
        context.trace.append(Applied(step.name, matches, perf_counter() - start))
    work.recompile()
    return work
