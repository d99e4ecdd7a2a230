"""Products of two matrices in their spellings: ``matmul``, ``bmm``, ``baddbmm``, ``einsum``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arkv_fx.passes.nodes import arguments, constant, op_name, rank_of
from torch.fx import Node


@dataclass(frozen=True)
class Product:
    """``alpha * left @ right + beta * added``.

    ``left`` [..., T, M]; ``right`` [..., M, N] where ``token`` is -1, else transposed [..., N, M].
    """

    node: Node
    left: Node
    right: Node
    token: int = -1
    alpha: float = 1.0
    beta: float = 1.0
    added: Node | None = None


def product(node: Node) -> Product | None:
    """The product that ``node`` is, None if it is something else."""
    name = op_name(node)
    if name in ("matmul", "bmm"):
        left, right = _pair(arguments(node, ["input", "other" if name == "matmul" else "mat2"]))
        return _plain(node, left, right)
    if name == "baddbmm":
        given = arguments(node, ["input", "batch1", "batch2"])
        alpha, beta = constant(given.get("alpha", 1.0)), constant(given.get("beta", 1.0))
        left, right, added = given.get("batch1"), given.get("batch2"), given.get("input")
        if alpha is None or beta is None or not isinstance(added, Node):
            return None
        found = _plain(node, left, right)
        zero = beta == 0.0 or op_name(added) in ("zeros", "new_zeros", "zeros_like", "empty")
        if found is None:
            return None
        return Product(node, found.left, found.right, -1, alpha, beta, None if zero else added)
    if name == "einsum":
        return _einsum(node)
    return None


def _pair(given: dict[str, Any]) -> tuple[Any, Any]:
    values = list(given.values())
    return (values[0], values[1]) if len(values) == 2 else (None, None)


def _plain(node: Node, left: Any, right: Any) -> Product | None:
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    if rank_of(left) < 3 or rank_of(left) != rank_of(right):
        return None  # a projection
    return Product(node, left, right)


def _einsum(node: Node) -> Product | None:
    """``bhqd,bhkd->bhqk`` and ``bhqk,bhkd->bhqd``: leading axes in the same order."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    if len(terms) != 2 or len(operands) != 2 or len(out) < 3:
        return None
    left, right = terms
    if out[:-1] != left[:-1]:
        (left, right), operands = (right, left), operands[::-1]
    summed = left[-1]
    if out[:-1] != left[:-1] or right[:-2] != out[:-2] or summed in out:
        return None
    if right[-2:] not in (summed + out[-1], out[-1] + summed):
        return None
    a, b = operands
    if not isinstance(a, Node) or not isinstance(b, Node):
        return None
    return Product(node, a, b, token=-1 if right[-2] == summed else -2)
