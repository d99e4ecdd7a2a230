"""Find every call of an attention function.

Matches ``F.scaled_dot_product_attention``, ``torch._C._nn.scaled_dot_product_attention``, the aten
overload, and ``arkv::attention``, to which transformers' attention interface leads what SDPA cannot
express (``huggingface.attention_interface``). Does NOT fire on hand-written softmax attention
(``find_softmax``), nor on attention with dropout.
"""

from __future__ import annotations

from typing import Any

from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.nodes import arguments, module_path, op_name, rank_of, shape
from arkv_fx.passes.pairing import look_through
from arkv_fx.passes.sites import DROPOUT, Bias, Site
from torch.fx import GraphModule, Node

SDPA = [
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
]  # fmt: skip
INTERFACE = ["query", "key", "value", "attn_mask", "is_causal", "scale", "softcap", "sinks"]


def run(graph: GraphModule, context: Context) -> int:
    """Append a ``Site`` to ``context.sites`` for each attention."""
    before = len(context.sites)
    for node in graph.graph.nodes:
        name = op_name(node)
        if name == "scaled_dot_product_attention":
            context.sites.append(_site(node, len(context.sites), arguments(node, SDPA)))
        elif name == "attention" and "arkv" in str(node.target):
            call = {**arguments(node, INTERFACE), "enable_gqa": True}
            context.sites.append(_site(node, len(context.sites), call))
    return len(context.sites) - before


PASS = Pass("find_sdpa", run, gives=("sites",))


def _site(node: Node, ordinal: int, call: dict[str, Any]) -> Site:
    mask, scale = call.get("attn_mask"), call.get("scale")
    site = Site(
        node=node,
        ordinal=ordinal,
        path=module_path(node),
        q=call["query"],
        k=call["key"],
        v=call["value"],
        is_causal=bool(call.get("is_causal", False)),
        scale=scale if isinstance(scale, float | int) else None,
        softcap=float(call.get("softcap") or 0.0),
        sinks=call.get("sinks"),
    )
    if isinstance(call.get("dropout_p", 0.0), Node) or call.get("dropout_p", 0.0):
        site.refuse(DROPOUT, lasting=False)
    if isinstance(scale, Node):
        site.refuse("the scale is computed in the graph, not a constant")
    if rank_of(site.q) < 3:
        site.refuse(f"query has shape {shape(site.q)}, not [..., heads, tokens, head dim]")
        return site
    look_through(site, grouped=bool(call.get("enable_gqa", False)))
    if isinstance(mask, Node):
        site.biases.append(Bias(mask, site.layout))
    return site
