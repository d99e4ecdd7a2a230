"""The first long prompt calibrates a model that has no calibration, and is served by the result.

A prompt attends to itself in full precision, whatever the plan; only what is kept of it at the end
hangs on the plan. So each layer's answers go on as ever, what it would lose under many budgets is
noted in passing (``costs.output_errors``), and its keys and values wait for the plan that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from arkv_fx import kept
from arkv_fx.calibration import Calibration, fingerprint
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.config import ArkvConfig
from arkv_fx.costs.output_errors import calibrated
from arkv_fx.costs.waiting import Waiting
from arkv_fx.errors import CalibrationError
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.model_caches import is_encoder_decoder
from arkv_fx.logs import get_logger

if TYPE_CHECKING:
    from arkv_fx.huggingface.transformed import Transformed

log = get_logger("calibration")
LEAST, MOST = 1024, 16384
"""Tokens of a prompt that calibrates: fewer say little, of more the full cache may not fit."""
ENOUGH = 2048
"""What fewer tokens told is replaced by what the first prompt of so many tells."""
PHRASE, NEW = 8, 0.5
"""Of its phrases of so many tokens, each beginning at another token, so large a part differs."""


def unsettled(calibration: Calibration | None) -> bool:
    """Whether a longer prompt would tell more than those of a calibration, if there is one."""
    return calibration is None or sum(calibration.samples) < ENOUGH


def tells(
    config: ArkvConfig, ids: Tensor, mask: Tensor | None = None, known: Calibration | None = None
) -> bool:
    """Whether each row of a prompt [B, T] has enough real tokens, and is no warm-up that repeats
    itself; ``known`` is what the model is calibrated by, if that is ``unsettled``.
    """
    least = LEAST if known is None else ENOUGH
    if config.calibration != "output":
        return False
    for row, tokens in enumerate(ids):
        if mask is not None:
            tokens = tokens[mask[row].bool()]
        if not least <= len(tokens) <= MOST:
            return False
        phrases = tokens.unfold(0, PHRASE, 1)
        if len(phrases.unique(dim=0)) < NEW * len(phrases):
            return False
    return True


def begins(
    config: ArkvConfig, cache: ArkvCache, ids: Tensor | None, mask: Tensor | None = None,
    known: Calibration | None = None,
) -> bool:  # fmt: skip
    """Whether a prompt [B, T] that tells something begins a sequence; ``mask`` is 0 at padding."""
    return (
        cache.seen == 0
        and cache.session.journal is None
        # Each rank would find a plan of its own.
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and ids is not None
        and tells(config, ids, mask, known)
    )


def wanted(owner: Transformed, cache: ArkvCache, ids: Tensor) -> bool:
    """Whether a call is the beginning of a sequence that can calibrate the model."""
    mask = cache.session.mask
    mask = mask if mask is not None and mask.shape == ids.shape else None
    known = owner.compiled.calibration
    return begins(owner.config, cache, ids, mask, known) and not is_encoder_decoder(owner.model)


def concluded(
    waiting: Waiting, cache: ArkvCache, model: nn.Module, tokens: int, windows: Sequence[int] = ()
) -> Calibration:
    """What a prompt told, kept for the next process; the cache is given the states that follow.

    Args:
        waiting: what the prompt's attention was handed to.
        windows: the layers' attention windows, 0 for full attention.

    Raises:
        CalibrationError: if it told nothing.
    """
    if not waiting.seen:
        raise CalibrationError("it has no attention that could be rewritten")
    calibration = calibrated(fingerprint(model), [waiting.found], [tokens], waiting.config)
    cache.session.layers.update(waiting.states(calibration, windows))
    kept.keep(calibration, model, waiting.config)
    log.info("%s is calibrated on a prompt of %d tokens", type(model).__name__, tokens)
    return calibration


def serve(owner: Transformed, cache: ArkvCache, kwargs: dict[str, Any], tokens: int) -> Any:
    """The answer to a prompt, the model calibrated by it; None if it cannot be, which is logged.

    Afterwards the owner has graphs of the new plan, and the cache the states that they take.
    """
    mask, waiting = cache.session.mask, Waiting(owner.config)
    old = owner.backend
    backend = ArkvBackend(
        owner.config, None, compile="eager", sliding=owner.windows, whole=old.whole,
        stand_in=waiting.attend, positions=old.positions,
    )  # fmt: skip
    try:
        out = owner.compiled_by(backend)(**kwargs)
        calibration = concluded(waiting, cache, owner.model, tokens, owner.windows)
    except CalibrationError as error:
        log.info("%s is not calibrated on its first prompt: %s", owner.name, error)
        cache.reset()
        cache.session.mask = mask
        return None
    new = owner.another_backend(calibration)
    # What was left alone there stays so.
    alone = [[s for s in sites if s.source and s.reason] for sites in (*old.sites, *backend.sites)]
    new.sites = [sites for sites in alone if sites]
    new.calls = 1
    owner.compiled = owner.compiled_by(new)
    return out
