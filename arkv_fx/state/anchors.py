"""State of absorbed caches: found by the storage of the zero-memory tensors a model carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from arkv_fx.errors import AbsorbedCacheError
from arkv_fx.plan import LayerPlan
from arkv_fx.state.session import LayerState


@dataclass
class _Entry:
    storage: StorageWeakRef
    state: LayerState
    length: int
    token_dim: int


_entries: dict[int, _Entry] = {}


class Anchors:
    """The absorbed states of one call of one graph."""

    def __init__(self) -> None:
        self.used: dict[int, _Entry] = {}

    def state(
        self,
        past: tuple[Any, ...],
        plan: LayerPlan,
        batch: int,
        device: torch.device,
        fresh: bool,
        where: str,
        token_dim: int = 2,
    ) -> tuple[LayerState, Tensor]:
        """The state behind a past (keys, values) pair and the anchor of its next cache value.

        ``token_dim`` is the dimension of the pair, and of that value, that counts tokens.

        Raises:
            AbsorbedCacheError: if the past is not what our graph returned last: cropped,
                reordered, expanded, copied or filled by another model.
        """
        if fresh:
            return self._start(plan, batch, device, token_dim)
        keys, values = past
        entry = _entries.get(_key(keys))
        if entry is None or entry.storage.expired():
            raise AbsorbedCacheError(
                f"{where}: the past keys {tuple(keys.shape)} were not returned by this compiled "
                "model (beam search, batch expansion, a copy, or a cache filled elsewhere), so "
                "their compressed state is unknown; use arkv_fx.transform with an ArkvCache"
            )
        if _key(values) != _key(keys):
            raise AbsorbedCacheError(f"{where}: past keys and values are of different sequences")
        if not keys.shape[token_dim] == values.shape[token_dim] == entry.length:
            raise AbsorbedCacheError(
                f"{where}: the past holds {keys.shape[token_dim]} tokens where {entry.length} were "
                "returned: it was cropped, which a compressed cache cannot follow; use "
                "arkv_fx.restore for rollback or assisted decoding"
            )
        if entry.state.plan != plan or entry.state.batch != batch:
            raise AbsorbedCacheError(
                f"{where}: batch or configuration changed in mid-sequence; start a new cache"
            )
        self.used[_key(keys)] = entry
        return entry.state, keys.as_strided((1,), (0,), 0)

    def _start(
        self, plan: LayerPlan, batch: int, device: torch.device, token_dim: int = 2
    ) -> tuple[LayerState, Tensor]:
        for key in [k for k, e in list(_entries.items()) if e.storage.expired()]:
            _entries.pop(key, None)  # another thread may have been faster
        # NaN, so that whoever reads it as numbers (an uncompiled model, user code) notices.
        anchor = torch.full((1,), float("nan"), dtype=plan.dtype, device=device)
        state = LayerState(plan, batch, device)
        entry = _Entry(StorageWeakRef(anchor.untyped_storage()), state, 0, token_dim)
        _entries[_key(anchor)] = self.used[_key(anchor)] = entry
        return entry.state, anchor

    def refuse_strangers(self, inputs: Sequence[Any]) -> None:
        """Refuse inputs that stand for a compressed cache where no rewritten site takes them.

        Raises:
            AbsorbedCacheError: such a tensor holds no numbers.
        """
        for x in inputs if _entries else ():
            # Such a tensor is a plain one; to ask one that is made of others takes Python.
            if type(x) is Tensor and x.dim() == 4 and _key(x) in _entries:
                if _key(x) not in self.used and not _entries[_key(x)].storage.expired():
                    raise AbsorbedCacheError(
                        f"a compressed cache of shape {tuple(x.shape)} is read by a graph whose "
                        "attention could not be rewritten, or has been sliced or reused elsewhere; "
                        "use arkv_fx.transform with an ArkvCache"
                    )

    def remember(self, outputs: Any) -> None:
        """Note how many tokens each returned cache value claims to hold."""
        if not self.used:
            return
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.dim() == 4:
                entry = self.used.get(_key(leaf))
                if entry is not None:
                    entry.length = leaf.shape[entry.token_dim]


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def absorbed_nbytes() -> int:
    """Bytes of all live absorbed states."""
    live = [e for e in _entries.values() if not e.storage.expired()]
    return sum(entry.state.nbytes() for entry in live)
