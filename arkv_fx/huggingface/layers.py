"""What each layer of a transformers model caches, as transformers itself reads its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from arkv_fx.config import ArkvConfig
from arkv_fx.errors import CacheError, TransformError

# Not in every release that is supported.
DynamicIndexedLayer: Any = getattr(cache_utils, "DynamicIndexedLayer", None)
DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)

KNOWN_LAYERS: set[Any] = {
    DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer, DynamicIndexedLayer,
    getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None),
}  # fmt: skip
"""The kinds of cached layers that are understood; what else a layer keeps might be lost.

A kind that is added here keeps tokens in our state if it is a ``DynamicLayer``, and a state of its
own if it is a ``LinearAttentionCacheLayerMixin``.
"""


ABSENT = ("activate_past_recording", "number_of_states", "record_past", "update_indexer")
"""What transformers asks every layer for, and goes on without where it is not there."""


class CompressedLayer:
    """Stands in the cache's list of layers for one whose keys and values are in our state.

    It answers what transformers asks of a layer, but for keys and values, which are codes here.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, index: int) -> None:
        self.index = index
        self.owner: Callable[[], Any] = lambda: None  # a weak reference to the cache

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedLayer:
        return CompressedLayer(self.index)  # of no cache as yet

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.index})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ABSENT:
            raise AttributeError(name)
        raise _not_there(self.index, name)

    @property
    def is_initialized(self) -> bool:
        """Whether it has had a token."""
        return self.get_seq_length() > 0

    @property
    def is_sliding(self) -> bool:
        """Whether its attention has a window."""
        return bool(self._cache().sliding[self.index])

    @property
    def max_cache_len(self) -> int:
        """-1: as many tokens as come."""
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first call."""
        return int(self._cache().batch_size)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return int(self._cache().get_seq_length(self.index))

    def get_max_length(self) -> int:
        """-1: as many tokens as come."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of the cache."""
        sizes: tuple[int, int] = self._cache().get_mask_sizes(query_length, self.index)
        return sizes

    def offload(self) -> None:
        """Nothing: it stays where it is."""

    def prefetch(self) -> None:
        """Nothing: it stays where it is."""

    def _cache(self) -> Any:
        cache = self.owner()
        if cache is None:
            raise CacheError(f"layer {self.index}: its cache is gone; keep the cache itself")
        return cache


def _not_there(index: int, name: str) -> CacheError:
    return CacheError(
        f"layer {index} of an ArkvCache has no {name!r}: its keys and values are codes, which "
        "cache.tensors() and cache.nbytes() tell of; a model that reads them needs its own cache: "
        "call arkv_fx.restore(model)"
    )


if DynamicIndexedLayer is not None:

    class IndexerLayer(DynamicIndexedLayer):  # type: ignore[misc]
        """An indexer's own keys, without the keys and values of the attention."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        @property
        def keys(self) -> Any:
            """Refused."""
            raise _not_there(self.index, "keys")

        @keys.setter
        def keys(self, value: Any) -> None:
            """transformers sets it to None."""


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's text decoder, None for a model without one."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        return config.get_text_config(decoder=True)
    return config


def cached_layers(model: nn.Module) -> list[Any]:
    """A fresh cache layer of transformers for each layer of the model; empty if it has none.

    Raises:
        TransformError: for a kind of layer that is not known here.
    """
    config = text_config(model)
    # Models of other origin may have a config too, of any kind.
    if not hasattr(config, "get_text_config") or not hasattr(config, "num_hidden_layers"):
        return []
    try:
        layers = list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TransformError(
            f"{type(model).__name__}: transformers makes no cache from its configuration "
            f"({error}); the model is left as it was"
        ) from error
    for index, layer in enumerate(layers):
        if type(layer) not in KNOWN_LAYERS:
            raise TransformError(
                f"{type(model).__name__}: layer {index} keeps what it cached in a "
                f"{type(layer).__name__}, which arkv_fx does not know; the model is left as it was"
            )
    return layers


def windows(layers: list[Any]) -> list[int]:
    """Attention window of each layer in tokens, 0 for full attention."""
    return [int(getattr(layer, "sliding_window", 0) or 0) for layer in layers]


def sliding_windows(model: nn.Module) -> list[int]:
    """Attention window of each layer of a model in tokens, 0 for full attention."""
    return windows(cached_layers(model))


def head_dims(model: nn.Module) -> list[int]:
    """Head dimensions of a transformers decoder's cached keys, as its attention modules say them.

    Without those of latent attention, which caches something else.
    """
    dims: set[Any] = {
        module.head_dim
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and hasattr(module, "is_causal")
        and isinstance(getattr(module, "head_dim", None), int)
        and not hasattr(module, "kv_lora_rank")
    }
    return sorted(dims)


def own_state(layers: list[Any]) -> list[Any]:
    """Layers that keep recurrent or convolution state, or an indexer, in transformers' own classes.

    The rest are ``CompressedLayer``.
    """
    out: list[Any] = []
    for index, layer in enumerate(layers):
        if isinstance(layer, DynamicLayer) and isinstance(layer, LinearAttentionCacheLayerMixin):
            out.append(LinearAttentionLayer(number_of_states=layer.number_of_states))
        elif _is_indexed(layer):
            out.append(IndexerLayer(index))
        elif isinstance(layer, LinearAttentionCacheLayerMixin):
            out.append(layer)
        else:
            out.append(CompressedLayer(index))
    return out


def kept_whole(layers: list[Any]) -> dict[int, str]:
    """Layers whose tokens stay in full precision, and why."""
    reason = (
        "its layer chooses tokens with an indexer: a token that it does not choose looks like "
        "padding, and its own keys grow with the text"
    )
    return {index: reason for index, layer in enumerate(layers) if _is_indexed(layer)}


def only_linear(layers: list[Any]) -> list[bool]:
    """Which layers have no attention beside their recurrent state."""
    return [
        isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, DynamicLayer)
        for layer in layers
    ]


def most_positions(model: nn.Module) -> int | None:
    """How many positions a model with a table of them knows; None if it has none."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    tables = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    # Some tables begin with a row or two for padding.
    found = isinstance(most, int) and bool(tables & {most, most + 1, most + 2})
    return most if found else None


def positions_to_come(model: nn.Module, config: ArkvConfig) -> int | None:
    """How many tokens a model and a configuration speak of; None if the model says nothing."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    return max(most, config.most_tokens) if isinstance(most, int) else None


def tensors_of(layer: Any) -> list[Tensor]:
    """All tensors of a layer of transformers."""
    if isinstance(layer, CompressedLayer):
        return []
    found: list[Tensor] = []
    for value in vars(layer).values():
        parts = value.values() if isinstance(value, dict) else [value]
        found += [part for part in parts if isinstance(part, Tensor)]
    return found


def _is_indexed(layer: Any) -> bool:
    return DynamicIndexedLayer is not None and isinstance(layer, DynamicIndexedLayer)
