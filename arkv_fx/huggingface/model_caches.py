"""Which caches a transformed model is given, and which it makes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
)
from transformers.generation.utils import ALL_CACHE_NAMES

from arkv_fx.errors import CacheError
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.positions import leave_last_open
from arkv_fx.state.journal import Journal

# What transformers calls the argument: by its new name since 5.24, which knows the old one, too.
CACHE_NAMES = ("past_key_values", "cache")[: 2 if "cache" in ALL_CACHE_NAMES else 1]

# What a model offers to generate with a paged cache of transformers' own.
CONTINUOUS = (
    "generate_batch", "init_continuous_batching", "continuous_batching_context_manager",
)  # fmt: skip


def refuse_continuous(name: str) -> NoReturn:
    """What stands for ``generate_batch`` and its kin on a transformed model.

    Raises:
        CacheError: always.
    """
    raise CacheError(
        f"{name}() keeps every token in a paged cache of transformers, which nothing compresses: "
        "call generate(), or undo with arkv_fx.restore(model)"
    )


def refuse_foreign(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a cache in an argument that is not one of those ``known``, whatever it is called.

    Raises:
        CacheError: naming the argument and the type.
    """
    for name, value in given.items():
        like = "cache" in type(value).__name__.lower() and hasattr(value, "update")
        if name not in known and (
            isinstance(value, Cache) or (like and not isinstance(value, dict))
        ):
            raise CacheError(
                f"{name}= is a {type(value).__name__}, a cache that is not ours and would grow in "
                "silence: pass ArkvCache(model), or undo with arkv_fx.restore(model)"
            )


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
    if generation_config.cache_implementation not in (None, "dynamic"):  # what ours stands for
        raise CacheError(
            f"cache_implementation={generation_config.cache_implementation!r} asks for a "
            "transformers cache, but the model is transformed to use ArkvCache; leave it out, or "
            "call arkv_fx.restore(model)"
        )
    _refuse_cut_mask(model, generation_config, model_kwargs)
    if is_encoder_decoder(model) and "assisted" in str(args[:1]).lower():
        raise CacheError(
            "assisted decoding and prompt lookup of an encoder-decoder take a DynamicCache only "
            "(transformers asks for it by name): leave them out, or call arkv_fx.restore(model)"
        )
    cache = take_cache(model_kwargs, CACHE_NAMES)
    if cache is None:
        cache = new_cache(model)
    else:
        if is_encoder_decoder(model):
            _warn_of_unmasked_prompt(our_cache(cache, model), model_kwargs)
        leave_last_open(
            our_cache(cache, model), _prompt_length(model, generation_config, model_kwargs)
        )
        cache._is_user_defined = True
    if getattr(generation_config, "is_assistant", False):
        # Its drafts will be taken back, and where there was but one the prompt's end, too.
        our_cache(cache, model).session.journal = Journal(least=2)
    model_kwargs[CACHE_NAMES[-1]] = cache


def _prompt_length(model: nn.Module, generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """How many tokens ``generate()`` was handed, as its mask tells; 0 if it does not."""
    decoder = is_encoder_decoder(model)
    mask = model_kwargs.get("decoder_attention_mask" if decoder else "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.shape[1]
    return 0 if decoder else int(getattr(generation_config, "_mask_length", 0))


def _refuse_cut_mask(model: nn.Module, generation_config: Any, model_kwargs: Any) -> None:
    """Refuse chunks of a decoder's prompt with which transformers would cut the encoder's mask.

    See docs/findings.md: up to 5.24 at least the prompt attends to the encoder's padding then.
    """
    mask = model_kwargs.get("attention_mask")
    if not getattr(generation_config, "prefill_chunk_size", None) or not is_encoder_decoder(model):
        return
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise CacheError(
            "prefill_chunk_size cuts the encoder's padding mask to the decoder's chunks, so the "
            "prompt would attend to padding (transformers does it without a word): leave it out, "
            "or call with texts of one length"
        )


def _warn_of_unmasked_prompt(cache: ArkvCache, model_kwargs: dict[str, Any]) -> None:
    """Say that transformers reads a decoder's whole prompt again behind what the cache holds of it.

    See docs/findings.md: it tells new tokens from those that are held by the mask alone.
    """
    if cache.seen and model_kwargs.get("decoder_attention_mask") is None:
        warnings.warn(
            f"the cache holds {cache.seen} tokens of the decoder, and without a mask generate() "
            "reads all of decoder_input_ids behind them, also what is held (transformers does so "
            "with any cache): pass decoder_attention_mask=torch.ones_like(decoder_input_ids) with "
            "the whole text, or a new cache",
            UserWarning,
            stacklevel=3,
        )


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


def our_cache(cache: Any, model: nn.Module) -> ArkvCache:
    """The ArkvCache that ``cache`` is or holds; an empty DynamicCache becomes one.

    In place, since whoever made it goes on with it: chat loops do, and ``generate()`` of a model
    that ``model`` is a part of.
    """
    found: Any = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if type(found) is DynamicCache and _is_unused(found):
        if _is_drafting():
            raise CacheError(
                "assisted decoding and prompt lookup take tokens back, and only where the whole "
                f"model is transformed does its cache keep what that takes: {type(model).__name__} "
                "is a part; call arkv_fx.restore on it and arkv_fx.transform on what generates"
            )
        found.__dict__ = ArkvCache(model).__dict__
        found.__class__ = ArkvCache  # type: ignore[assignment]
        ArkvCache.claim_layers(found)  # type: ignore[arg-type]
    if not isinstance(found, ArkvCache):
        raise CacheError(
            f"the model is transformed but got a {type(cache).__name__}; pass ArkvCache(model), "
            "or no cache at all, or undo with arkv_fx.restore(model). (An empty DynamicCache is "
            "taken over; one that holds a learned prefix, as PEFT makes, is not)"
        )
    return found


def _is_unused(cache: DynamicCache) -> bool:
    """Whether nothing is in it yet, and nothing was asked of it that ours would not do."""
    plain = not getattr(cache, "offloading", False)
    return plain and not any(getattr(layer, "is_initialized", False) for layer in cache.layers)


def _is_drafting() -> bool:
    """Whether this call is of assisted decoding or prompt lookup.

    It has told the cache that tokens will be taken back; but while that was a DynamicCache, which
    does not keep what it is told, so only the stack knows.
    """
    drafting = getattr(GenerationMixin, "_assisted_decoding", None)
    frame: FrameType | None = sys._getframe()
    while frame is not None and drafting is not None:
        if frame.f_code is drafting.__code__:
            return True
        frame = frame.f_back
    return False


def only_looks_ahead(model: nn.Module) -> bool:
    """Whether a model is an encoder by its own word: its config may speak of a cache all the same.

    A cache would keep what later tokens never read.
    """
    generates = getattr(model, "can_generate", lambda: True)()
    flags = [
        m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)
    ]
    return bool(flags) and not any(flags) and not generates and not is_encoder_decoder(model)
