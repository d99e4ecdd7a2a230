"""Sinks written behind the softmax: ``softmax(x) @ v * sigmoid(logsumexp(x) - sink)``.

That is the softmax with one more logit, ``sink``, whose probability goes nowhere:
e^x / (sum e^x + e^sink) = softmax(x) * sigmoid(log sum e^x - sink).
"""

from __future__ import annotations

from arkv_fx.passes.nodes import op_name, rank_of
from torch.fx import Node

_PLAIN = {"to", "_to_copy", "type_as", "unsqueeze", "float"}


def find(logits: Node, output: Node) -> tuple[Node, Node] | None:
    """(the scaled output, the sinks [Hq]) if ``output`` is scaled by what reads ``logits``."""
    node = next((u for u in logits.users if op_name(u) == "logsumexp"), None)
    sinks: Node | None = None
    while node is not None and len(node.users) == 1:
        before, node = node, next(iter(node.users))
        name = op_name(node)
        if name == "sub" and sinks is None and node.args[0] is before:
            sinks = _per_head(node.args[1])
            if sinks is None:
                return None
        elif name in ("mul", "imul") and sinks is not None:
            return (node, sinks) if output in node.args and list(output.users) == [node] else None
        elif name not in _PLAIN | {"sigmoid"} and not _adds_axes(node):
            return None
    return None


def _adds_axes(node: Node) -> bool:
    """``x[..., None]``."""
    index = node.args[1] if op_name(node) == "getitem" else ()
    whole = (None, Ellipsis, slice(None))
    return isinstance(index, tuple) and bool(index) and all(entry in whole for entry in index)


def _per_head(node: object) -> Node | None:
    """The vector that ``node`` only reshapes."""
    while isinstance(node, Node) and op_name(node) in ("view", "reshape", "unsqueeze", "getitem"):
        node = node.args[0]
    return node if isinstance(node, Node) and rank_of(node) == 1 else None
