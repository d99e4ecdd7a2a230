"""Who needs the numbers of a tensor that the rewritten graph will not have."""

from __future__ import annotations

from collections.abc import Iterable

from arkv_fx.passes.layout import VIEWS
from arkv_fx.passes.nodes import op_name
from torch.fx import Node

SIZES = {"size", "dim", "numel", "sym_size", "shape", "ndim", "dtype", "device"}


def foreign_reader(tensor: Node, allowed: Iterable[Node], *, output: bool = False) -> Node | None:
    """A use of ``tensor``, directly or through views, outside ``allowed``; None if there is none.

    Shape queries need no numbers; ``output`` also allows returning it from the graph.
    """
    fine = set(allowed)
    todo = list(tensor.users)
    while todo:
        user = todo.pop()
        if user in fine or op_name(user) in SIZES or (output and user.op == "output"):
            continue
        if op_name(user) in VIEWS | {"slice"} and user is not tensor:
            todo += list(user.users)
            continue
        return user
    return None
