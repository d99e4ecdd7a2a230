"""``ArkvCache``: the transformers cache whose ``update`` marks the place for the passes."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from arkv_fx.errors import CacheError
from arkv_fx.state.session import Session


class ArkvCache(Cache):
    """State of one batch of sequences of one transformed model.

    ``generate()`` of a transformed model makes one by itself; pass your own to keep a
    conversation going. Memory is bounded: ``nbytes()`` does not grow with the sequence.

    Args:
        model: the model that ``arkv_fx.transform`` returned.

    Raises:
        CacheError: if the model is not transformed.
    """

    is_compileable = False

    def __init__(self, model: nn.Module) -> None:
        transformed = getattr(model, "arkv", None)
        if transformed is None:
            raise CacheError(
                f"{type(model).__name__} is not transformed: call arkv_fx.transform(model) first"
            )
        super().__init__(layers=[])
        self.session = Session(owner=transformed.name)
        self.model_id = id(transformed)
        self.handle = self.session.handle
        self.seen = 0
        self.sliding = list(transformed.sliding_layers)
        self.first_layer = transformed.first_layer

    def __deepcopy__(self, memo: dict[int, Any]) -> ArkvCache:
        """A cache of its own that goes on from the same tokens: prefix reuse."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.session = copy.deepcopy(self.session, memo)
        twin.handle = twin.session.handle
        return twin

    def __reduce__(self) -> NoReturn:
        raise CacheError("an ArkvCache is not pickled: copy.deepcopy makes a second one")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Mark new keys and values [B, Hkv, T, D]; the passes fuse this with the attention."""
        if layer_idx == self.first_layer:
            # Apart, so that a graph traced for an empty cache knows that it is: it may then attend
            # to the prompt alone, with fused attention.
            new = key_states.shape[-2]
            self.seen = new if self.seen == 0 else self.seen + new
        keys, values = torch.ops.arkv.kv_update(
            key_states, value_states, self.handle, layer_idx, self.seen
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next query."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Masks are made over all positions; slots take their columns by position."""
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the sequence may be of any length."""
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers have an attention window."""
        return self.sliding

    @property
    def is_linear(self) -> list[bool]:
        """No layer of ours is a linear attention."""
        return [False] * len(self.sliding)

    @property
    def is_dummy(self) -> list[bool]:
        """No layer of ours is a dummy."""
        return [False] * len(self.sliding)

    def __len__(self) -> int:
        return len(self.sliding)

    def __bool__(self) -> bool:  # an empty cache is still a cache
        return True

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first call."""
        for state in self.session.layers.values():
            return state.batch
        return -1

    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds: codes, scales, scores, positions and all."""
        return self.session.nbytes()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for inspection: do not write to them."""
        out = {"handle": self.handle}
        for index, state in self.session.layers.items():
            for spec, tensor in zip(state.plan.specs(), state.tensors, strict=True):
                out[f"{index}.{spec.name}"] = tensor
        for index, plain in self.session.plain.items():
            for name, tensor in zip(("keys", "values"), plain.tensors, strict=False):
                out[f"{index}.{name}"] = tensor
        return out

    def reset(self) -> None:
        """Forget the sequence; the cache can be used for a new one."""
        self.session.reset()
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences for beam search; ``beam_idx`` [B] int64."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if self.batch_size > 0:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what the removed tokens displaced is gone or quantized.

        Raises:
            CacheError: unless nothing is removed.
        """
        if tokens_to_remove == 0:
            return None
        raise CacheError(
            "an ArkvCache cannot be cropped: tokens that the removed ones displaced are already "
            "quantized or evicted. Assisted decoding and rollback need the full cache "
            "(arkv_fx.restore); to start over call reset()"
        )

    def _select(self, rows: Tensor) -> None:
        for part in self.session.parts():
            part.select(rows)
