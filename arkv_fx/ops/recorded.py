"""Attention whose last tokens may be taken back: they come one at a time, and are written down.

Drafts of several tokens are judged in one call, and most calls lose some of them again. Each takes
the step that it would have taken alone, so what stays is the state of having decoded one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from arkv_fx.errors import CacheError
from arkv_fx.kernels.softmax import Knobs, allowed
from arkv_fx.plan import LayerPlan
from arkv_fx.state.journal import Journal, kept_in


def attend_recorded(
    journal: Journal, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, state: Sequence[Tensor], plan: LayerPlan, knobs: Knobs, fresh: bool,
    kernel: str, computed: Sequence[Tensor] | None,
) -> Tensor:  # fmt: skip
    """What ``attend`` does with the same arguments, token by token at the end.

    Raises:
        CacheError: if keys are computed from all that is cached: they would have to be for each.
    """
    if computed:
        raise CacheError(
            "tokens of multi-head latent attention cannot be taken back: assisted decoding and "
            "crop need the full cache (arkv_fx.restore)"
        )
    length = k.shape[2]
    short = not fresh and length <= journal.depth
    alone = length if short else min(journal.candidates, length - 1)
    if mask is not None and alone > 1 and _sees_later(mask, alone):
        alone = 0  # they attend to each other: one by one they could not
    many = length - alone
    outs = []
    with kept_in(None):
        if many > 1:
            shown = mask[..., :many, : mask.shape[-1] - alone] if mask is not None else None
            first = (x[:, :, :many] for x in (q, k, v))
            outs.append(attend(*first, shown, state, plan, knobs, fresh, kernel))
            journal.begin(state)
        layer = journal.of(state)
        for place in range(0 if many == 1 else many, length):
            later = length - 1 - place
            own = slice(place, place + 1)
            shown = mask[..., own, : mask.shape[-1] - later] if mask is not None else None
            q_own, k_own, v_own = (x[:, :, own].clone() for x in (q, k, v))
            seen = None if shown is None else shown.clone()
            step = partial(_step, attend, q_own, k_own, v_own, seen, plan, knobs, kernel)
            outs.append(step(state))
            layer.add(step, journal.depth)
    return torch.cat(outs, 2)


def _sees_later(mask: Tensor, tokens: int) -> bool:
    """Whether one of the last tokens may attend to one that comes after it."""
    own = allowed(mask[..., -tokens:, -tokens:])
    return bool(own.triu(1).any())


def _step(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    plan: LayerPlan, knobs: Knobs, kernel: str, state: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    return attend(q, k, v, mask, state, plan, knobs, False, kernel)
