"""Check the rewritten graph: structure sound, every state used once, no marker half fused.

Raises ``PassError`` instead of letting a wrong graph run.
"""

from __future__ import annotations

from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.nodes import op_name
from arkv_fx.passes.sites import Marker
from torch.fx import GraphModule

from arkv_fx.errors import PassError


def run(graph: GraphModule, context: Context) -> int:
    """Raise if a fused site is not one operator over its own state, or a state not updated once."""
    graph.graph.lint()
    attends = [n for n in graph.graph.nodes if op_name(n) in ("attend", "peek")]
    planned = len(context.fused) + sum(site.cache.behind is not None for site in context.fused)
    if len(attends) != planned:
        raise PassError(
            f"{planned} operators were planned but {len(attends)} attend operators are in the "
            "graph; this is a bug in arkv_fx: please report the model"
        )
    for states in context.state_inputs:
        users = [n for n in attends if states[0] in n.all_input_nodes]
        readers = {n for s in states for n in s.users}
        if strange := [n for n in readers if op_name(n) not in ("attend", "peek", "columns")]:
            raise PassError(f"state {states[0].name}.. has another reader: {strange[0]}")
        writers = [n for n in users if op_name(n) == "attend"]
        if writers != users[-1:]:
            raise PassError(
                f"state {states[0].name}.. is updated {len(writers)} times instead of once, at last"
            )
    fused_layers = {s.layer for s in context.fused if isinstance(s.cache, Marker)}
    for node in graph.graph.nodes:
        if op_name(node) == "kv_update" and node.args[3] in fused_layers:
            raise PassError(
                f"layer {node.args[3]} has both a fused attention and a cache update that is "
                "still read; its tokens would be kept twice"
            )
    graph.recompile()
    return len(attends)


PASS = Pass("verify", run, needs=("operators", "positions"))
