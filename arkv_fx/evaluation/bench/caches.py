"""Whole models with a cache that is full already: ours, and those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.utils import logging

from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ModelNotFoundError
from arkv_fx.evaluation.bench.cases import Options, filled
from arkv_fx.evaluation.bench.timing import compiled
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.layers import positions_to_come, sliding_windows
from arkv_fx.models import load
from arkv_fx.plan import plan_layer
from arkv_fx.transforming import restore, transform


@dataclass(frozen=True)
class Decoder:
    """A model's forward with a cache of its own; ``full``: the cache holds every token as it is."""

    forward: Callable[..., Any]
    cache: Any
    full: bool

    def step(self, token: Tensor) -> Tensor:
        """Logits [B, vocabulary] after one more token [B, 1]."""
        out = self.forward(input_ids=token, past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits[:, -1]
        return logits

    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds."""
        if isinstance(self.cache, ArkvCache):
            return self.cache.nbytes()
        return sum(t.untyped_storage().nbytes() for t in _tensors(self.cache.layers))


def _tensors(x: Any) -> Iterable[Tensor]:
    """Tensors anywhere in layers, lists and quantized tensors of a transformers cache."""
    if hasattr(x, "__tensor_flatten__"):
        yield from _tensors([getattr(x, name) for name in x.__tensor_flatten__()[0]])
    elif isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple | dict):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _tensors(part)
    elif type(x).__module__.startswith("transformers."):
        yield from _tensors(vars(x))


def load_model(options: Options) -> PreTrainedModel:
    """The model to measure; random weights if it is named by a config file.

    Raises:
        ModelNotFoundError: if it cannot be found or read.
    """
    logging.disable_progress_bar()
    if not options.model.endswith(".json"):
        return load(options.model, options.dtype, options.device)[0]
    path = Path(options.model)
    if not path.is_file():  # transformers would look for it on the hub
        raise ModelNotFoundError(
            f"cannot make a model from {options.model!r}: there is no such file"
        )
    try:
        config = AutoConfig.from_pretrained(path)
        with options.device:  # billions of random numbers take a CPU minutes
            model: Any = AutoModelForCausalLM.from_config(config, dtype=options.dtype)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"cannot make a model from {options.model!r}: {error}") from error
    ready: PreTrainedModel = model.eval()
    return ready


@dataclass(frozen=True)
class Layer:
    """What one layer caches: kv heads, query heads, dimensions of keys and values, window."""

    heads: int
    q_heads: int
    k_dim: int
    v_dim: int
    sliding: int

    def random(self, tokens: int, options: Options) -> tuple[Tensor, Tensor]:
        """Keys and values [1, Hkv, N, D]."""
        k, v = (
            torch.randn(1, self.heads, tokens, dim, dtype=options.dtype, device=options.device)
            for dim in (self.k_dim, self.v_dim)
        )
        return k, v


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """Measured by a forward of one token."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    held = model(input_ids=ids, use_cache=True).past_key_values.layers
    q_heads = model.config.get_text_config(decoder=True).num_attention_heads
    windows = sliding_windows(model) or [0] * len(held)
    return [
        Layer(x.keys.shape[1], q_heads, x.keys.shape[-1], x.values.shape[-1], window)
        for x, window in zip(held, windows, strict=True)
    ]


def full_cache(cache: Any, layers: list[Layer], tokens: int, options: Options) -> Any:
    """A transformers cache after ``tokens`` tokens, their keys and values random."""
    for index, layer in enumerate(layers):
        cache.update(*layer.random(tokens, options), index)
    return cache


def arkv_decoder(
    model: PreTrainedModel, layers: list[Layer], tokens: int, lowering: str, options: Options,
    config: ArkvConfig | None = None,
) -> Decoder:  # fmt: skip
    """The transformed model, its states as after a prompt of random keys and values."""
    config = config or options.config(1024)
    transform(model, config, False, compile=lowering)
    try:
        cache, forward = ArkvCache(model), model.forward
    finally:
        restore(model)  # its forward goes on working, and the next method gets the plain model
    for index, layer in enumerate(layers):
        plan = plan_layer(
            config, heads=layer.heads, k_dim=layer.k_dim, v_dim=layer.v_dim, dtype=options.dtype,
            sliding=layer.sliding, positions=positions_to_come(model, config),
        )  # fmt: skip
        cache.session.layers[index] = filled(
            plan, layer.q_heads // layer.heads, tokens, 1, options.device
        )
    cache.seen = cache.session.tokens = tokens
    return Decoder(forward, cache, full=False)


def decoders(
    model: PreTrainedModel, tokens: int, room: int, options: Options
) -> dict[str, Callable[[], Decoder]]:
    """How to make each method's decoder, its cache holding ``tokens`` and room for ``room`` more.

    Making one raises ImportError where a package is missing, or transformers' support for it.
    """
    config, layers, plain = model.config, layers_of(model), model.forward
    # On CUDA the static cache decodes from CUDA graphs; a growing one cannot.
    mode = "reduce-overhead" if options.device.type == "cuda" else None

    def theirs(cache: Callable[[], Any], full: bool = True, **how: Any) -> Callable[[], Decoder]:
        def make() -> Decoder:
            run = compiled(plain, options.backend, **how) if how else plain
            return Decoder(run, full_cache(cache(), layers, tokens, options), full)

        return make

    def quantized(backend: str) -> QuantizedCache:
        try:
            return QuantizedCache(backend, config)
        except ValueError as error:  # older versions lack fp8, and some layers have no such cache
            raise ImportError(f"transformers {transformers.__version__}: {error}") from error

    def ours(lowering: str) -> Callable[[], Decoder]:
        return lambda: arkv_decoder(model, layers, tokens, lowering, options)

    return {
        **{f"arkv-{lowering}": ours(lowering) for lowering in options.lowerings},
        "dynamic-eager": theirs(lambda: DynamicCache(config=config)),
        "dynamic-compiled": theirs(lambda: DynamicCache(config=config), dynamic=True),
        "static-compiled": theirs(
            lambda: StaticCache(config=config, max_cache_len=tokens + room),
            dynamic=False,
            mode=mode,
        ),
        **{
            f"quantized-{backend}": theirs(partial(quantized, backend), full=False)
            for backend in ("quanto", "hqq", "fp8")
        },
    }
