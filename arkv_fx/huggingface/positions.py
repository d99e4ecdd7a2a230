"""Whether a call goes on where its cache stopped: positions never go back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arkv_fx.errors import CacheError
from arkv_fx.huggingface.cache import ArkvCache


def require_onward(cache: ArkvCache, positions: Any, mask: Any) -> None:
    """Refuse a call of several tokens at positions that the cache holds already.

    Args:
        positions: of the new tokens [B or 1, T], or [T]; others say nothing about their order.
        mask: the padding mask [B, S] of the call, if there is one: padding has any position.

    Raises:
        CacheError: naming the positions.
    """
    states = cache.session.layers.values()
    if not cache.seen or not isinstance(positions, Tensor) or positions.dim() not in (1, 2):
        return
    # Of one token not: to look would wait for the device in every step.
    if not states or positions.shape[-1] < 2:
        return
    # Real tokens so far: whoever leaves padding out counts these, all others count more.
    held = next(iter(states))["count"].to(positions.device)
    first = torch.atleast_2d(positions)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= first.shape[1]:
        padding = mask[:, -first.shape[1] :].to(positions.device) == 0
        first = first.masked_fill(padding, torch.iinfo(first.dtype).max)
    first = first.amin(1)
    if (first < held).any():
        raise CacheError(
            f"tokens come at position {int(first.min())} where the cache holds {cache.seen} tokens "
            "already. Were they fed before, they would be taken for new ones behind these: give "
            "only the tokens that follow, go on with a copy that was made before (copy.deepcopy), "
            "call cache.crop(-tokens), or begin anew with cache.reset(). Are positions smaller on "
            "purpose (compressed over the turns, as in self-extend), an ArkvCache cannot tell: its "
            "positions count tokens; such a model needs its own cache (arkv_fx.restore(model))"
        )


def leave_last_open(cache: ArkvCache, prompt: int) -> None:
    """Before ``generate``: a cache that holds the whole prompt of ``prompt`` tokens gives one back.

    The prompt's last token is then computed again: its logits begin the text. transformers would
    feed the whole prompt behind itself.

    Raises:
        CacheError: if the cache holds more than the prompt, or cannot give a token back.
    """
    if not 0 < prompt <= cache.seen:
        return
    if prompt < cache.seen:
        raise CacheError(
            f"the prompt has {prompt} tokens and the cache holds {cache.seen} already: hand "
            "generate() the whole text so far, the cached part included, or begin with a new cache"
        )
    try:
        cache.crop(-1)
    except CacheError as error:
        raise CacheError(
            f"the cache holds all {prompt} tokens of the prompt, so generate() has nothing to begin"
            f" with, and the last token cannot be computed again ({error}): cache all of a prompt "
            "but its last token, or hand on a copy (copy.deepcopy) that was made before"
        ) from error
