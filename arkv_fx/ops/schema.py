"""The operators that graphs carry: ``arkv::kv_update`` (the marker) and ``arkv::attend``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arkv_fx.errors import CacheError
from arkv_fx.ops.attend import attend
from arkv_fx.ops.attention import Knobs
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
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor(a!)[] state, str plan, "
    "float scale, float softcap, Tensor? sink_logits, bool fresh, str kernel='reference') -> Tensor"
)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Sequence[Tensor], plan: str,
    scale: float, softcap: float, sink_logits: Tensor | None, fresh: bool,
    kernel: str = "reference",
) -> Tensor:  # fmt: skip
    knobs = Knobs(scale, softcap, sink_logits)
    return attend(q, k, v, mask, state, LayerPlan.parse(plan), knobs, fresh, kernel)


# Composite: whoever traces the graph sees plain torch operators, so Inductor generates code for
# the whole step and export needs no operator of ours.
_library.impl("attend", _attend, "CompositeImplicitAutograd")
