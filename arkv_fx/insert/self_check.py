"""Whether a model with an inserted cache is the same model: full forward against bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from arkv_fx.config import ArkvConfig
from arkv_fx.errors import TransformError
from arkv_fx.insert.program import Program
from arkv_fx.insert.tracing import Captured
from arkv_fx.state.session import Session

SAMPLE = 11
"""Tokens of the self-check: no extent that a model is likely to have, since tracing takes equal
extents for the same."""
ROOMY = ArkvConfig(budget=64, window=16, tiers=("native",))
"""Holds the self-check's tokens as they are."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest difference between incremental and full forward, relative to the largest output."""


def stretched(leaves: Sequence[Any], dims: dict[int, list[int]]) -> list[Any]:
    """The leaves with exactly ``SAMPLE`` tokens: the first ones, over and over."""
    out = list(leaves)
    for leaf, where in dims.items():
        for dim in where:
            index = torch.arange(SAMPLE, device=out[leaf].device) % out[leaf].shape[dim]
            out[leaf] = out[leaf].index_select(dim, index)
    return out


def self_check(
    name: str,
    forward: Callable[..., Any],
    graph: Captured,
    programs: tuple[Program, Program],
    leaves: Sequence[Any],
) -> None:
    """Refuse unless the last tokens, fed bit by bit, answer as in the full forward.

    Args:
        forward: the model's own.
        programs: the rewritten graph for the first call and for later ones, under ``ROOMY``.
        leaves: of the arguments of a call.

    Raises:
        TransformError: naming the output that differs and by how much.
    """
    first, later = programs
    dims = graph.token_dims(first.tokens)
    leaves = stretched(leaves, dims)
    args, kwargs = tree_unflatten(leaves, graph.in_spec)
    with torch.no_grad():
        full = tree_leaves(forward(*args, **kwargs))
    session = Session("the self-check")
    parts: list[list[Any]] = []
    seen = 0
    for length in (SAMPLE - 4, 2, 1, 1):
        cut = list(leaves)
        for leaf, where in dims.items():
            for dim in where:
                cut[leaf] = cut[leaf].narrow(dim, seen, length)
        program = later if seen else first
        parts.append(tree_leaves(graph.output(program(graph.inputs(cut), session, seen))))
        seen += length
    for number, (expected, pieces) in enumerate(zip(full, zip(*parts, strict=True), strict=True)):
        if not isinstance(expected, Tensor):
            continue
        found = _joined(expected, pieces)
        which = f"{name}: output {number}"
        if found is None:
            raise TransformError(
                f"{which} has shape {tuple(expected.shape)} in the full forward and "
                f"{tuple(pieces[-1].shape)} with a cache; the model is left as it was"
            )
        error = (found.double() - expected.double()).abs().max() / expected.abs().max()
        if not error <= TOLERANCE.get(expected.dtype, 0.0):
            raise TransformError(
                f"{which} {tuple(expected.shape)}, computed bit by bit with a cache, differs from "
                f"the full forward by {float(error):.1e} of its largest entry: something besides "
                "the attention that was found mixes tokens or counts positions "
                f"({_uncached(first)}); the model is left as it was"
            )


def _joined(expected: Tensor, pieces: Sequence[Tensor]) -> Tensor | None:
    """The pieces along the dimension that counts tokens; the last if none does."""
    if pieces[-1].shape == expected.shape:
        return pieces[-1]
    for dim in range(expected.dim()):
        sizes = [p.shape[dim] for p in pieces]
        if sum(sizes) == expected.shape[dim] and sizes[-1] == 1:
            joined = torch.cat(list(pieces), dim)
            return joined if joined.shape == expected.shape else None
    return None


def _uncached(program: Program) -> str:
    alone = [f"{s.name}: {s.reason}" for s in program.sites if not s.fused]
    return "attention left alone: " + "; ".join(alone) if alone else "no attention was left alone"
