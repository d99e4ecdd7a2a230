"""Look through the expansion of kv heads to query heads.

Peels ``x[:, :, None].expand(B, Hkv, G, S, D).reshape(B, Hkv * G, S, D)`` in its spellings,
``repeat_interleave`` over heads, and no-ops (``contiguous``, ``to`` the same dtype). Does NOT peel
``.repeat`` or an expansion in another order: those would pair query heads with other kv heads.
"""

from __future__ import annotations

from typing import Any

from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import example, op_name, same_size, shape
from torch.fx import GraphModule, Node


def run(graph: GraphModule, context: Context) -> None:
    """Replace each site's ``k`` and ``v`` by the tensors before their expansion."""
    for site in context.sites:
        site.k, site.v = peel(site.k), peel(site.v)


def peel(node: Node) -> Node:
    """The [B, Hkv, S, D] tensor that ``node`` expands, or ``node``."""
    while True:
        inner = _step(node)
        if inner is None:
            return node
        node = inner


def _step(node: Node) -> Node | None:
    name = op_name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if name in ("contiguous", "clone", "detach"):
        return source
    if name in ("to", "_to_copy", "type_as") and example(node) is not None:
        return source if example(source).dtype == example(node).dtype else None
    if name == "repeat_interleave":
        return source if _argument(node, 2, "dim") in (1, -3) else None
    if name in ("reshape", "view", "flatten", "_unsafe_view"):
        return _expansion(node, source)
    return None


def _expansion(node: Node, expanded: Node) -> Node | None:
    """``reshape(expand(unsqueeze(x, 2)))`` in group-minor order."""
    if op_name(expanded) in ("clone", "contiguous"):
        expanded = expanded.args[0]  # type: ignore[assignment]
    if op_name(expanded) != "expand":
        return None
    lifted = expanded.args[0]
    if not isinstance(lifted, Node) or not _adds_axis_two(lifted):
        return None
    base = lifted.args[0]
    outer, five, four = shape(node), shape(expanded), shape(base)
    if outer is None or five is None or four is None:
        return None
    if (len(outer), len(five), len(four)) != (4, 5, 4):
        return None
    # [B, H, S, D] -> [B, H, G, S, D] -> [B, H*G, S, D]: nothing else has these shapes.
    same = all(same_size(five[i], four[j]) for i, j in ((0, 0), (1, 1), (3, 2), (4, 3)))
    same = same and all(same_size(outer[i], five[j]) for i, j in ((0, 0), (2, 3), (3, 4)))
    return base if same and isinstance(base, Node) else None


def _adds_axis_two(node: Node) -> bool:
    name = op_name(node)
    if name == "unsqueeze":
        return _argument(node, 1, "dim") in (2, -3)
    if name == "getitem":
        index = node.args[1]
        if not isinstance(index, tuple):
            return False
        whole = slice(None, None, None)
        return index[:3] == (whole, whole, None) and all(i == whole for i in index[3:])
    return False


def _argument(node: Node, position: int, name: str) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name)
