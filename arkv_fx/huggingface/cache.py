"""``ArkvCache``: the transformers cache whose ``update`` marks the place for the passes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from arkv_fx.errors import CacheError
from arkv_fx.huggingface.layers import (
    CompressedLayer,
    cached_layers,
    only_linear,
    own_state,
    tensors_of,
    windows,
)
from arkv_fx.huggingface.saved import read, write
from arkv_fx.options import require_type, short
from arkv_fx.state.journal import Journal
from arkv_fx.state.rollback import take_back
from arkv_fx.state.session import Session, check_finite


class ArkvCache(Cache):
    """State of one batch of sequences of one transformed model.

    ``generate()`` of a transformed model makes one by itself; pass your own to keep a
    conversation going. Memory is bounded: ``nbytes()`` does not grow with the sequence. Where the
    model and its configuration speak of fewer than 32768 tokens, more are refused (``CacheError``):
    their positions are kept in two bytes.

    Args:
        model: the model that ``arkv_fx.transform`` returned.

    Raises:
        CacheError: if the model is not transformed.

    Example:
        >>> import torch, arkv_fx
        >>> from arkv_fx.models import random_model
        >>> config = arkv_fx.ArkvConfig(budget=64, window=16)
        >>> model = arkv_fx.transform(random_model("llama"), config, compile="eager")
        >>> cache = arkv_fx.ArkvCache(model)
        >>> with torch.no_grad():
        ...     logits = model(torch.ones(1, 200, dtype=torch.long), past_key_values=cache).logits
        ...     held = cache.nbytes()
        ...     logits = model(torch.ones(1, 100, dtype=torch.long), past_key_values=cache).logits
        >>> cache.get_seq_length(), cache.nbytes() == held
        (300, True)
    """

    is_compileable = False

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise CacheError(
                f"ArkvCache({short(model)}): give the model that arkv_fx.transform returned"
            )
        transformed = getattr(model, "arkv", None)
        if transformed is None:
            raise CacheError(
                f"{type(model).__name__} is not transformed: call arkv_fx.transform(model) first"
            )
        layers = cached_layers(transformed.model)  # of what ``model`` wraps, if it does
        super().__init__(layers=own_state(layers))
        self.claim_layers()
        self.session = Session(owner=transformed.name)
        self.owner = weakref.ref(transformed)
        self.handle = self.session.handle
        self.sliding = [window > 0 for window in windows(layers)]
        self.linear = only_linear(layers)
        self.compiled: Any = None  # the forward, or programs, that its sequence began with
        # Tokens before the step at hand, those that it brings, and how far it has come.
        self.seen, self.coming, self.last_layer = 0, 0, -1

    def __deepcopy__(self, memo: dict[int, Any]) -> ArkvCache:
        """A cache of its own that goes on from the same tokens: prefix reuse."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.session = copy.deepcopy(self.session, memo)
        twin.handle = twin.session.handle
        twin.layers = [copy.deepcopy(layer, memo) for layer in self.layers]
        twin.claim_layers()
        return twin

    def claim_layers(self) -> None:
        """Let the layers ask this cache: they were made for it, or for one that it stands for."""
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.owner = weakref.ref(self)

    def __reduce__(self) -> NoReturn:
        raise CacheError(
            "an ArkvCache is not pickled: copy.deepcopy makes a second one, save(path) a file"
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to a safetensors file, which ``load`` reads in any process.

        Raises:
            CacheError: if the model is gone or has layers that keep a state of their own (linear
                attention), or the file cannot be written.
            ConfigError: if ``path`` is none.
        """
        require_type("path", path, (str, PathLike), "the path of a file")
        owner = self.owner()
        if owner is None or self._own_layers():
            what = "its model is gone" if owner is None else "recurrent states are not"
            raise CacheError(f"the cache cannot be saved: {what}")
        self.require(owner)
        began = owner if self.compiled is None else self.compiled
        write(path, self.session, owner, began.calibration)

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module) -> ArkvCache:
        """The cache that ``save`` wrote: the same tokens, for the same model and configuration.

        Raises:
            CacheError: if it was saved for another model, dtype or configuration, by another
                version, or is damaged.
            ConfigError: if ``path`` is none.
        """
        require_type("path", path, (str, PathLike), "the path of a file that save wrote")
        cache = cls(model)
        owner: Any = cache.owner()
        cache.compiled = owner.under(read(path, cache.session, owner))
        cache.seen = cache.session.tokens
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Mark new keys and values [B, Hkv, T, D]; the passes fuse this with the attention."""
        self.coming, self.last_layer = key_states.shape[-2], layer_idx
        # Apart, so that a graph traced for an empty cache knows that it is: it may then attend to
        # the prompt alone, with fused attention.
        total = self.coming if self.seen == 0 else self.seen + self.coming
        keys, values = torch.ops.arkv.kv_update(
            key_states, value_states, self.handle, layer_idx, total
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included; those of this step once the layer has had them."""
        return self.seen + self.coming if layer_idx <= self.last_layer else self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next query."""
        return self.get_seq_length(layer_idx)

    @contextmanager
    def turn(self) -> Generator[None]:
        """One step, of one thread.

        Raises:
            CacheError: if another is in a step of this cache.
        """
        if not self.session.turn.acquire(blocking=False):
            raise CacheError(
                "another thread is in a step of this ArkvCache: a sequence goes on one step at a "
                "time; give each thread its own (ArkvCache(model), or copy.deepcopy(cache) before "
                "they begin), or hold a lock around each call"
            )
        try:
            yield
        finally:
            self.session.turn.release()

    def require(self, owner: Any) -> None:
        """Refuse to go on with another model's sequence, or with one that a failed step left.

        ``owner`` is the ``model.arkv`` that the cache is used with.

        Raises:
            CacheError: saying which.
            NonFiniteError: if that is what stopped the step.
        """
        if self.owner() is not owner:
            raise CacheError(
                f"this ArkvCache belongs to {self.session.owner}, not to {owner.name}: keys of one "
                "model mean nothing to another; make one with ArkvCache(model)"
            )
        if self.session.tokens != self.seen:
            # NaN says more than the step that it stopped.
            check_finite(self.session.layers.items())
            raise CacheError(
                f"the cache counts {self.seen} tokens and its states do not: a step was "
                "interrupted or failed, or the cache was copied with copy.copy; start a new one "
                "(copy.deepcopy makes an independent copy)"
            )

    def end_step(self) -> None:
        """All layers have had the step's tokens."""
        self.seen, self.coming, self.last_layer = self.seen + self.coming, 0, -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Masks are made over all positions; slots take their columns by position."""
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: nothing in it is as large as the sequence may be long."""
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers have an attention window."""
        return self.sliding

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` takes back the last tokens: after ``activate_past_recording``."""
        return self.session.journal is not None and not self._own_layers()

    def activate_past_recording(self) -> None:
        """Keep what it takes to take back the last tokens, 32 or as many as a draft has.

        That is a second state of each layer, so the cache's bytes double. ``generate()`` calls this
        for assisted decoding and prompt lookup.
        """
        if not getattr(self.owner(), "records", False):
            raise CacheError(
                "tokens of a cache that arkv_fx inserted cannot be taken back: copy.deepcopy(cache)"
                " keeps a state to go back to"
            )
        if self.session.journal is None:
            self.session.journal = Journal()

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have no attention, only a recurrent or convolution state."""
        return self.linear

    @property
    def is_dummy(self) -> list[bool]:
        """No layer of ours is a dummy."""
        return [False] * len(self.sliding)

    @property
    def is_initialized(self) -> bool:
        """Whether it has had a token."""
        return self.seen > 0

    @property
    def max_cache_len(self) -> int:
        """-1: nothing in it is as large as the sequence may be long."""
        return -1

    def __len__(self) -> int:
        return len(self.sliding)

    def __iter__(self) -> Iterator[Any]:
        raise CacheError(
            "an ArkvCache does not hand out keys and values, which are codes: nbytes(), tensors() "
            "and cache.layers say what it holds"
        )

    def __getitem__(self, layer: int) -> Any:
        return iter(self)

    def __bool__(self) -> bool:  # an empty cache is still a cache
        return True

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first call."""
        for state in self.session.layers.values():
            return state.batch
        return -1

    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds: codes, scales, scores, positions and all.

        Recurrent and convolution states of hybrid models are counted, too.
        """
        own = [t for layer in self.layers for t in tensors_of(layer)]
        return self.session.nbytes() + sum(t.untyped_storage().nbytes() for t in own)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for inspection: do not write to them."""
        out = {"handle": self.handle}
        for index, state in self.session.layers.items():
            out.update({f"{index}.{name}": tensor for name, tensor in state.named().items()})
        for index, plain in self.session.plain.items():
            for name, tensor in zip(("keys", "values"), plain.tensors, strict=False):
                out[f"{index}.{name}"] = tensor
        for index, layer in enumerate(self.layers):
            for number, tensor in enumerate(tensors_of(layer)):
                out[f"{index}.own{number}"] = tensor
        return out

    def reset(self) -> None:
        """Forget the sequence; the cache can be used for a new one."""
        self.session.reset()
        self.seen, self.coming, self.last_layer = 0, 0, -1
        for layer in self._own_layers():
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences for beam search; ``beam_idx`` [B] int64."""
        self._select(_sequences("beam_idx", beam_idx, self.batch_size))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` [N] int64.

        Raises:
            CacheError: if they are no numbers of sequences.
        """
        self._select(_sequences("indices", indices, self.batch_size))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times.

        Raises:
            CacheError: if that is no whole number of at least one.
        """
        if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
            raise CacheError(f"repeats={repeats!r}: a whole number of at least 1 is needed")
        if self.batch_size > 0:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; ``tokens_to_remove`` is 0 or negative, as in transformers.

        All of them, as many as ``activate_past_recording`` keeps what it takes for, or any number
        as long as all tokens are held as the window holds them: nothing was quantized or evicted.

        Raises:
            CacheError: if what they displaced is quantized or evicted, or the model keeps states of
                its own that have no way back (linear attention).
        """
        if not isinstance(tokens_to_remove, int) or not -self.seen <= tokens_to_remove <= 0:
            raise CacheError(
                f"crop({tokens_to_remove!r}): give minus the number of tokens to remove, at most "
                f"the {self.seen} that the cache has seen"
            )
        if tokens_to_remove == 0:
            return None
        if -tokens_to_remove == self.seen:
            return self.reset()
        if self._own_layers():
            raise CacheError(
                "tokens cannot be taken back: layers that are no attention keep a state that has "
                "no way back; assisted decoding needs a model of attention alone"
            )
        take_back(self.session, -tokens_to_remove)
        self.seen += tokens_to_remove

    def _select(self, sequences: Tensor) -> None:
        self.session.select(sequences)
        for layer in self._own_layers():
            layer.reorder_cache(sequences)

    def _own_layers(self) -> list[Any]:
        """Layers that transformers keeps: recurrent states and indexers."""
        return [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]


def _sequences(name: str, chosen: Any, batch: int) -> Tensor:
    """Numbers of sequences [N] int64.

    Raises:
        CacheError: saying what was given and what is allowed.
    """
    if isinstance(chosen, list | tuple) and all(type(i) is int for i in chosen):
        chosen = torch.tensor(chosen, dtype=torch.int64)
    whole = isinstance(chosen, Tensor) and chosen.dtype in (torch.int32, torch.int64)
    if not whole or chosen.dim() != 1 or not len(chosen):
        raise CacheError(
            f"{name}={chosen!r}: a tensor [N] of int64 is needed, the numbers of sequences"
        )
    if batch >= 0 and not bool(((chosen >= 0) & (chosen < batch)).all()):
        raise CacheError(f"{name}={chosen.tolist()}: the cache holds sequences 0 to {batch - 1}")
    found: Tensor = chosen.long()
    return found
