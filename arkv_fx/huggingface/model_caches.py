"""Which caches a transformed model is given, and which it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.generation.utils import ALL_CACHE_NAMES

from arkv_fx.errors import CacheError
from arkv_fx.huggingface.cache import ArkvCache

# What transformers calls the argument: by its new name since 5.24, which knows the old one, too.
CACHE_NAMES = ("past_key_values", "cache")[: 2 if "cache" in ALL_CACHE_NAMES else 1]


def prepare_cache(
    model: nn.Module,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """``generate()``'s hook: an ArkvCache instead of a DynamicCache."""
    if generation_config.use_cache is False:
        return
    if generation_config.cache_implementation is not None:
        raise CacheError(
            f"cache_implementation={generation_config.cache_implementation!r} asks for a "
            "transformers cache, but the model is transformed to use ArkvCache; leave it out, or "
            "call arkv_fx.restore(model)"
        )
    cache = take_cache(model_kwargs, CACHE_NAMES)
    if cache is None:
        cache = new_cache(model)
    else:
        our_cache(cache)
        cache._is_user_defined = True
    model_kwargs[CACHE_NAMES[-1]] = cache


def take_cache(kwargs: dict[str, Any], names: Sequence[str]) -> Any:
    """Take an argument out that has one of several names; None if there is none.

    Raises:
        CacheError: if two names give different ones.
    """
    found = [kwargs.pop(name) for name in names if name in kwargs]
    given = [value for value in found if value is not None]
    if any(value is not given[0] for value in given):
        raise CacheError(f"{' and '.join(map(repr, names))} are one argument, and differ: give one")
    return given[0] if given else None


def new_cache(model: nn.Module) -> Any:
    """What a transformed model takes as ``past_key_values``.

    An ``ArkvCache``; for an encoder-decoder one for its self-attention, and transformers' own for
    its cross-attention, whose keys are those of the encoder and never grow.
    """
    if not is_encoder_decoder(model):
        return ArkvCache(model)
    return EncoderDecoderCache(ArkvCache(model), DynamicCache())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder, and its decoder cross-attention."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def our_cache(cache: Any) -> ArkvCache:
    """The ArkvCache that ``cache`` is or holds."""
    found = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(found, ArkvCache):
        raise CacheError(
            f"the model is transformed but got a {type(cache).__name__}; pass ArkvCache(model), "
            "or no cache at all, or undo with arkv_fx.restore(model)"
        )
    return found


def only_looks_ahead(model: nn.Module) -> bool:
    """Whether a model is an encoder by its own word: its config may speak of a cache all the same.

    A cache would keep what later tokens never read.
    """
    generates = getattr(model, "can_generate", lambda: True)()
    flags = [
        m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)
    ]
    return bool(flags) and not any(flags) and not generates and not is_encoder_decoder(model)
