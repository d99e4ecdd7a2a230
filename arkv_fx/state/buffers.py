"""State of absorbed static buffers: found by the memory of the buffer that a model writes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from arkv_fx.errors import AbsorbedCacheError
from arkv_fx.plan import LayerPlan
from arkv_fx.state.session import LayerState


@dataclass
class _Entry:
    storage: StorageWeakRef
    state: LayerState
    length: int


_entries: dict[tuple[int, int], _Entry] = {}


class Buffers:
    """The states behind the buffers of one call of one graph."""

    def __init__(self) -> None:
        self.used: dict[tuple[int, int], tuple[_Entry, int]] = {}

    def state(
        self,
        past: Sequence[Tensor],
        plan: LayerPlan,
        batch: int,
        start: int,
        length: int,
        where: str,
        token_dim: int = 2,
    ) -> LayerState:
        """The state behind a pair of buffers, for ``length`` new tokens from position ``start`` on.

        A call that writes from position 0 on begins a new sequence.

        Raises:
            AbsorbedCacheError: if the positions do not go on where the last call stopped, or the
                batch or the configuration changed.
        """
        key = _key(past[0])
        entry = _entries.get(key)
        if start == 0:
            entry = self._start(past, plan, batch, token_dim)
        if entry is None or entry.storage.expired() or entry.length < 0:
            raise AbsorbedCacheError(
                f"{where}: tokens are written from position {start} on, but what is before was not "
                "written by this compiled model (or a step of it failed), so its compressed state "
                "is unknown; begin at position 0"
            )
        if entry.length != start:
            raise AbsorbedCacheError(
                f"{where}: tokens are written from position {start} on, but the sequence holds "
                f"{entry.length}: a compressed cache cannot go back or leave tokens out; begin a "
                "new sequence at position 0"
            )
        if entry.state.plan != plan or entry.state.batch != batch:
            raise AbsorbedCacheError(
                f"{where}: batch ({entry.state.batch}, now {batch}) or configuration changed in "
                "mid-sequence; begin a new sequence at position 0"
            )
        self.used[key] = (entry, start + length)
        return entry.state

    def _start(self, past: Sequence[Tensor], plan: LayerPlan, batch: int, token_dim: int) -> _Entry:
        for key in [k for k, e in list(_entries.items()) if e.storage.expired()]:
            _entries.pop(key, None)  # another thread may have been faster
        keys = past[0]
        with torch.no_grad():
            # NaN, so that whoever reads the buffer itself (the model uncompiled) notices.
            for buffer in past:
                buffer.select(token_dim, 0).fill_(float("nan"))
        state = LayerState(plan, batch, keys.device)
        entry = _Entry(StorageWeakRef(keys.untyped_storage()), state, 0)
        _entries[_key(keys)] = entry
        return entry

    def refuse_strangers(self, inputs: Sequence[Any]) -> None:
        """Refuse buffers that stand for compressed tokens where no rewritten site takes them.

        Raises:
            AbsorbedCacheError: such a buffer does not hold its tokens.
        """
        for x in inputs if _entries else ():
            if isinstance(x, Tensor) and x.dim() == 4 and (key := _key(x)) in _entries:
                if key not in self.used and not _entries[key].storage.expired():
                    raise AbsorbedCacheError(
                        f"a cache buffer {tuple(x.shape)}, whose tokens are compressed, is read by "
                        "a graph whose attention could not be rewritten; begin a new "
                        "sequence with new buffers, or transform all of the model"
                    )

    def doubt(self) -> None:
        """Until ``remember``, the states may have seen half a step."""
        for entry, _ in self.used.values():
            entry.length = -1

    def remember(self) -> None:
        """The step is done: note how many tokens each state has seen."""
        for entry, length in self.used.values():
            entry.length = length


def first_position(start: Any, positions: Tensor | None, where: str) -> int:
    """Where a call writes its first token.

    Args:
        start: that position, if ``positions`` is None.
        positions: [T] int, one for each new token.

    Raises:
        AbsorbedCacheError: if the positions do not follow each other.
    """
    if positions is None:
        return int(start)
    found = positions.tolist()
    if found != list(range(found[0], found[0] + len(found))):
        raise AbsorbedCacheError(
            f"{where}: new tokens are written at positions {found}, not one behind the other"
        )
    return int(found[0])


def _key(x: Tensor) -> tuple[int, int]:
    return int(x.untyped_storage()._cdata), int(x.storage_offset())
