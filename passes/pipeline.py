"""The passes in order: the one list that transform, torch.compile and export share.

What they did is in ``context.trace``, and in the log ("arkv_fx.passes"): one line for each graph at
level INFO, at DEBUG the graph before and after each pass that changed it.
"""

from __future__ import annotations

import copy
import logging
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

from arkv_fx.logs import get_logger

log = get_logger("passes")

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
    shown = log.isEnabledFor(logging.DEBUG)
    text = _text(work) if shown else ""
    for step in PASSES:
        start = perf_counter()
        matches = step.run(work, context)
        context.trace.append(Applied(step.name, matches, perf_counter() - start))
        if shown and (after := _text(work)) != text:
            log.debug("the graph before %s:\n%s", step.name, text)
            log.debug("the graph after %s:\n%s", step.name, after)
            text = after
    work.recompile()
    if log.isEnabledFor(logging.INFO):
        log.info("%s", _line(context))
    return work


def _text(graph: GraphModule) -> str:
    return graph.print_readable(print_output=False)


def _line(context: Context) -> str:
    """One graph in one line: its sites, what each pass acted on, how long they took."""
    matched = ", ".join(f"{done.name} {done.matches}" for done in context.trace if done.matches)
    seconds = sum(done.seconds for done in context.trace)
    return (
        f"{len(context.sites)} attention sites, {len(context.fused)} fused "
        f"({matched or 'no pass matched'}) in {1000 * seconds:.1f} ms"
    )
