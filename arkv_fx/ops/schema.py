"""The operators that graphs carry.

``arkv::kv_update`` and ``arkv::attention`` mark what a model does; ``arkv::attend``, ``arkv::peek``
(which leaves the state as it is) and ``arkv::columns`` are what the passes put in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arkv_fx.errors import CacheError
from arkv_fx.kernels.softmax import full_attention
from arkv_fx.ops.as_given import as_given
from arkv_fx.ops.attend import attend, columns, peek
from arkv_fx.ops.signatures import AttendArguments, ColumnsArguments
from arkv_fx.plan import LayerPlan
from arkv_fx.state.session import PlainLayer, find_session


@torch.library.custom_op("arkv::kv_update", mutates_args=())
def kv_update(
    k: Tensor, v: Tensor, handle: Tensor, layer: int, total: int
) -> tuple[Tensor, Tensor]:
    """Append new keys and values [B, H, T, D] and read all ``total`` back.

    A marker: the passes fuse it with the attention that follows. Where they cannot, this runs as
    it stands and the layer keeps everything in full precision, so the model stays right.

    Raises:
        CacheError: if called outside the transformed model that owns the cache.
    """
    session = find_session(handle)
    if not session.active:
        raise CacheError(
            f"layer {layer}: this ArkvCache belongs to {session.owner or 'a transformed model'} "
            "and was used by another or by one that is not transformed; make the cache with "
            "ArkvCache(model) for the model that arkv_fx.transform returned"
        )
    if layer in session.layers:
        raise CacheError(
            f"layer {layer}: its attention ran outside the compiled graph, so it cannot see the "
            "compressed tokens; was compilation switched off (a recompile limit, "
            "TORCHDYNAMO_DISABLE) in mid-sequence?"
        )
    plain = session.plain.setdefault(layer, PlainLayer())
    keys, values = plain.append(k, v)
    if keys.shape[-2] != total:
        raise CacheError(
            f"layer {layer}: {keys.shape[-2]} tokens are held where the cache counts {total}; "
            "was this layer run twice or left out in a step?"
        )
    return keys, values


@kv_update.register_fake
def _(k: Tensor, v: Tensor, handle: Tensor, layer: int, total: int) -> tuple[Tensor, Tensor]:
    return (
        k.new_empty(*k.shape[:-2], total, k.shape[-1]),
        v.new_empty(*v.shape[:-2], total, v.shape[-1]),
    )


_library = torch.library.Library("arkv", "FRAGMENT")
for _name, _written in (("attend", ["state"]), ("peek", [])):
    _library.define(f"{_name}({AttendArguments.schema(_written)}) -> Tensor")
_library.define(f"columns({ColumnsArguments.schema()}) -> (Tensor, Tensor)")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float scale, float softcap, Tensor? sinks) -> Tensor"
)


def _with_state(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        given: AttendArguments[Tensor] = AttendArguments(*args, **kwargs)
        return given.run(run)

    return call


def _columns(*args: Any) -> tuple[Tensor, Tensor]:
    given: ColumnsArguments[Tensor] = ColumnsArguments(*args)
    with as_given(given.k):
        return columns(given.k, given.v, given.state, LayerPlan.parse(given.plan), given.fresh)


# Composite: whoever traces the graph sees plain torch operators, so Inductor generates code for
# the whole step and export needs no operator of ours.
_library.impl("attend", _with_state(attend), "CompositeImplicitAutograd")
_library.impl("peek", _with_state(peek), "CompositeImplicitAutograd")
_library.impl("columns", _columns, "CompositeImplicitAutograd")
_library.impl("attention", full_attention, "CompositeImplicitAutograd")
