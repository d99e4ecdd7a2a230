"""Find every scaled-dot-product attention.

Matches ``F.scaled_dot_product_attention``, ``torch._C._nn.scaled_dot_product_attention`` and the
aten overload. Does NOT fire on hand-written softmax attention, nor on attention with dropout.
"""

from __future__ import annotations

from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import arguments, module_path, op_name, shape
from arkv_fx.passes.site import Site
from torch.fx import GraphModule, Node

ARGUMENTS = [
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
]  # fmt: skip


def run(graph: GraphModule, context: Context) -> None:
    """Append a ``Site`` to ``context.sites`` for each attention."""
    for node in graph.graph.nodes:
        if op_name(node) == "scaled_dot_product_attention":
            context.sites.append(_site(node, len(context.sites)))


def _site(node: Node, ordinal: int) -> Site:
    call = arguments(node, ARGUMENTS)
    mask, scale = call.get("attn_mask"), call.get("scale")
    site = Site(
        node=node,
        ordinal=ordinal,
        path=module_path(node),
        q=call["query"],
        k=call["key"],
        v=call["value"],
        mask=mask if isinstance(mask, Node) else None,
        is_causal=bool(call.get("is_causal", False)),
        scale=scale if isinstance(scale, float | int) else None,
        grouped=bool(call.get("enable_gqa", False)),
    )
    if isinstance(call.get("dropout_p", 0.0), Node) or call.get("dropout_p", 0.0):
        site.refuse("attention dropout is on: call model.eval()", lasting=False)
    if isinstance(scale, Node):
        site.refuse("the scale is computed in the graph, not a constant")
    if len(shape(site.q) or ()) != 4:
        site.refuse(f"query has shape {shape(site.q)}, not [batch, heads, tokens, head dim]")
    return site
