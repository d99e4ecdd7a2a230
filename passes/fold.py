"""What a tensor made of constants and sizes alone is: masks from buffers, ``tril``, ``arange``.

Nothing here looks at what a model is given: a tensor that depends on an input is no constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from arkv_fx.passes.nodes import example
from arkv_fx.passes.sites import HIDES
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

LARGEST = 8192
"""A mask is looked at with at most so many tokens."""


def is_constant(node: Node, constants: Mapping[str, Tensor]) -> bool:
    """Whether ``node`` is computed from ``constants`` (by placeholder) and sizes alone."""
    return all(
        n.op not in ("placeholder", "get_attr") or n.name in constants for n in _sources(node)
    )


def look_at(
    node: Node, constants: Mapping[str, Tensor], tokens: Any, bound: int | None
) -> Tensor | None:
    """The value of a constant [.., T, T] tensor for a T that shows all there is to see.

    Args:
        tokens: the symbol of T.
        bound: the largest T that the model allows, None if it allows any. Without one a pattern
            can only change at a number that the graph names (a window of 256), so T goes beyond
            the largest of them.

    Returns:
        None if that T is more than ``LARGEST`` or another size is unknown.
    """
    extent = bound
    if extent is None:
        extent = max([8, *_numbers(node)]) + 3
    return _evaluate(node, constants, tokens, extent) if extent <= LARGEST else None


def what_is_shown(mask: Tensor, factor: float, drop: bool) -> tuple[Tensor, bool]:
    """A mask as bool, True where it shows, and whether it also changes logits that it shows.

    Args:
        factor: what an additive mask is multiplied by.
        drop: a bool mask hides where it is True.
    """
    if mask.dtype == torch.bool:
        return ~mask if drop else mask, False
    added = mask * factor
    shown = added > HIDES
    return shown, bool(added[shown].any())


def causal_window(shown: Tensor) -> int | None:
    """How far back [.., T, T] looks: 0 for plain causal, w for the last w tokens, None if neither.

    The same for all leading dimensions.
    """
    if shown.dim() < 2 or shown.shape[-1] != shown.shape[-2]:
        return None  # it broadcasts over queries or keys
    flat = shown.reshape(-1, *shown.shape[-2:])
    one = flat[0]
    if not bool((flat == one).all()):
        return None
    causal = torch.ones_like(one).tril()
    if torch.equal(one, causal):
        return 0
    window = int(one[-1].sum())
    return window if window and torch.equal(one, causal.triu(1 - window)) else None


def size_at(size: Any, tokens: Any, extent: int) -> int | None:
    """A size for that many tokens; None if it hangs on something else too."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr.xreplace({tokens: extent})
    return None if getattr(expr, "free_symbols", ()) else int(expr)


def _sources(node: Node) -> list[Node]:
    """``node`` and all that it is computed from, stopping at sizes."""
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        for source in current.all_input_nodes:
            if source not in seen and not isinstance(example(source), torch.SymInt):
                seen.add(source)
                todo.append(source)
    return list(seen)


def _numbers(node: Node) -> list[int]:
    """Magnitudes of all numbers that a tensor's computation names, but for "to the end"."""
    found: list[int] = []

    def note(value: Any) -> None:
        if isinstance(value, list | tuple):
            for part in value:
                note(part)
        elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**40:
            found.append(abs(value))

    for source in _sources(node):
        note((source.args, tuple(source.kwargs.values())))
    return found


def _evaluate(
    node: Node, constants: Mapping[str, Tensor], tokens: Any, extent: int
) -> Tensor | None:
    known: dict[Node, Any] = {}
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    with torch.no_grad():
        for source in sorted(_sources(node), key=order.__getitem__):
            if source.op == "placeholder":
                known[source] = constants[source.name]
                continue
            for size in source.all_input_nodes:
                if size not in known:
                    known[size] = size_at(example(size), tokens, extent)
                    if known[size] is None:
                        return None
            args = map_arg(source.args, known.__getitem__)
            kwargs = map_arg(source.kwargs, known.__getitem__)
            call: Any = source.target
            if source.op == "call_method":
                call, args = getattr(args[0], str(source.target)), args[1:]
            known[source] = call(*args, **kwargs)
    value = known[node]
    return value if isinstance(value, Tensor) else None
