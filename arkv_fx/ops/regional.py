"""The decode step compiled on its own: one compilation serves all layers of one shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)


def regional_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: list[Tensor],
    plan: str,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
    fresh: bool,
) -> Tensor:
    """``arkv::attend`` through Inductor for one new token, as it stands for many.

    A prompt comes once; compiling its pass would cost more than it saves.
    """
    constants = (plan, scale, softcap, fresh)
    if q.shape[2] != 1:
        return _operator(q, k, v, mask, state, sink_logits, constants)
    return _compiled(constants)(q, k, v, mask, state, sink_logits)


def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: list[Tensor],
    sink_logits: Tensor | None,
    constants: tuple[str, float, float, bool],
) -> Tensor:
    plan, scale, softcap, fresh = constants
    out: Tensor = torch.ops.arkv.attend(
        q, k, v, mask, state, plan, scale, softcap, sink_logits, fresh
    )
    return out


@lru_cache(maxsize=256)
def _compiled(constants: tuple[str, float, float, bool]) -> Callable[..., Tensor]:
    def step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        state: list[Tensor],
        sink_logits: Tensor | None,
    ) -> Tensor:
        return _operator(q, k, v, mask, state, sink_logits, constants)

    return torch.compile(step)
