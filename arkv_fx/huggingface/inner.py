"""Models inside of a transformed one: called by themselves they keep a cache of their own."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.model_caches import CACHE_NAMES


def watch(model: nn.Module) -> list[RemovableHandle]:
    """Let each model inside of ``model`` warn when it answers with a cache that is not ours.

    ``lm.model(ids)`` does not pass through ``lm.forward``, and makes what transformers makes.
    """
    return [
        part.register_forward_hook(functools.partial(_warn, type(model).__name__, path))
        for path, part in model.named_modules()
        if part is not model and isinstance(part, PreTrainedModel)
    ]


def _warn(whole: str, path: str, part: nn.Module, args: Any, out: Any) -> None:
    """A forward hook."""
    if torch.compiler.is_compiling():  # in the graph of the whole, which has its own cache
        return
    parts = out if isinstance(out, tuple) else [getattr(out, name, None) for name in CACHE_NAMES]
    cache = next((part for part in parts if isinstance(part, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if isinstance(cache, Cache) and not isinstance(cache, ArkvCache):
        warnings.warn(
            f"{path} ({type(part).__name__}) of a transformed {whole} was called by itself and "
            f"keeps a {type(cache).__name__}, which nothing compresses: call the {whole}, or "
            f"arkv_fx.restore it and transform {path}; use_cache=False if no cache is wanted",
            UserWarning,
            stacklevel=2,
        )
