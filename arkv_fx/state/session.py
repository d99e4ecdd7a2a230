"""Sessions: who owns which state tensors, found by a handle that a compiled graph can carry."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from arkv_fx.errors import CacheError, NonFiniteError
from arkv_fx.plan import LayerPlan
from arkv_fx.state.journal import Journal
from arkv_fx.state.view import View, view

_handles = itertools.count(1)
_sessions: WeakValueDictionary[int, Session] = WeakValueDictionary()


class LayerState:
    """The state tensors of one attention layer for a fixed batch.

    ``tensors`` are those of ``plan.specs()`` in that order, as graphs take them; ``state["pos"]``
    is one of them.
    """

    def __init__(self, plan: LayerPlan, batch: int, device: torch.device) -> None:
        self.plan, self.batch = plan, batch
        # Born under inference_mode they could not be written outside of it.
        with torch.inference_mode(False):
            self.tensors = [
                torch.full((batch, *s.shape), s.fill, dtype=s.dtype, device=device)
                for s in plan.specs()
            ]

    @classmethod
    def of(cls, plan: LayerPlan, tensors: list[Tensor]) -> LayerState:
        """One that has these tensors."""
        state = cls.__new__(cls)
        state.plan, state.batch, state.tensors = plan, len(tensors[0]), tensors
        return state

    def __getitem__(self, name: str) -> Tensor:
        """The state tensor of that name."""
        return self.tensors[self.plan.places[name]]

    def named(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return dict(zip(self.plan.places, self.tensors, strict=True))

    def view(self) -> View:
        """The tensors by what they are."""
        return view(self.plan, self.tensors)

    def clone(self) -> LayerState:
        """The same state in tensors of its own."""
        twin = copy.copy(self)
        with torch.inference_mode(False):
            twin.tensors = [t.clone() for t in self.tensors]
        return twin

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors)

    def select(self, sequences: Tensor) -> None:
        """Keep these of the sequences, given by number (beam search, batch expansion)."""
        with torch.inference_mode(False):
            self.tensors = [t.index_select(0, sequences.to(t.device)) for t in self.tensors]
        self.batch = len(sequences)


def check_finite(layers: Iterable[tuple[int, LayerState]]) -> None:
    """Refuse to go on with keys or values that were not finite.

    Raises:
        NonFiniteError: naming the layer and the sequences of the batch.
    """
    layers = list(layers)
    flags = [state["bad"] for _, state in layers]
    if not flags or not torch.cat(flags).any():  # one look for all layers: it waits for the device
        return
    for layer, state in layers:
        bad = state["bad"]
        if bad.any():
            raise NonFiniteError(
                f"layer {layer}: keys or values of sequence(s) {bad.nonzero().flatten().tolist()} "
                "hold NaN or infinity: look at the model's dtype (float16 overflow?) or its "
                "input. This cache is spoilt; start a new one"
            )


class PlainLayer:
    """Full-precision keys and values of a layer whose attention could not be rewritten."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []  # keys and values, once there are any

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, H, T, D] and return everything so far."""
        new = [k.detach(), v.detach()]
        if self.tensors:
            new = [torch.cat([old, x], -2) for old, x in zip(self.tensors, new, strict=True)]
        self.tensors = [x.clone() for x in new] if not self.tensors else new
        keys, values = self.tensors
        return keys.clone(), values.clone()

    def clone(self) -> PlainLayer:
        """The same keys and values in tensors of their own."""
        twin = PlainLayer()
        with torch.inference_mode(False):
            twin.tensors = [t.clone() for t in self.tensors]
        return twin

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors)

    def select(self, sequences: Tensor) -> None:
        """Keep these of the sequences, given by number."""
        self.tensors = [t.index_select(0, sequences.to(t.device)) for t in self.tensors]

    def take_back(self, tokens: int) -> None:
        """Forget the last ``tokens``."""
        self.tensors = [t[..., : t.shape[-2] - tokens, :].clone() for t in self.tensors]


class Session:
    """The states of all layers of one batch of sequences.

    Graphs find it by ``handle``, an int64 CPU scalar that travels as an ordinary input.
    """

    def __init__(self, owner: str = "") -> None:
        number = next(_handles)
        self.handle = torch.tensor(number, dtype=torch.int64)
        self.owner = owner
        self.layers: dict[int, LayerState] = {}
        self.plain: dict[int, PlainLayer] = {}
        self.active = False
        self.turn = threading.Lock()  # held by the one thread that is in a step
        self.tokens = 0  # what the states have seen, kept by whoever runs the model
        self.mask: Tensor | None = None  # the last padding mask [B, S], likewise
        self.journal: Journal | None = None  # if tokens may be taken back
        _sessions[number] = self

    def layer(self, index: int, plan: LayerPlan, batch: int, device: torch.device) -> LayerState:
        """The state of a layer, made on first use.

        Raises:
            CacheError: if the batch or the plan is not the one the sequence began with.
        """
        state = self.layers.get(index)
        if state is None:
            if self.plain.get(index):
                raise CacheError(
                    f"layer {index} was computed unfused before and fused now: one sequence must "
                    "stay with one transform; start a new cache"
                )
            state = self.layers[index] = LayerState(plan, batch, device)
        if state.batch != batch:
            raise CacheError(
                f"layer {index}: the cache holds {state.batch} sequences, this call has {batch}; "
                "a batch cannot change in mid-sequence: start a new cache, or use "
                "batch_select_indices / batch_repeat_interleave"
            )
        if state.plan is not plan:
            if state.plan != plan:
                raise CacheError(
                    f"layer {index}: the cache was begun under another configuration or "
                    "calibration than the one the model is transformed with now; start a new cache"
                )
            state.plan = plan  # the next step's look is enough then
        return state

    def require_room(self, limit: int, tokens: int) -> None:
        """Refuse so many more tokens where the plans number only ``limit`` in all.

        Raises:
            CacheError: saying how many there are, and what to do.
        """
        if self.tokens + tokens > limit:
            raise CacheError(
                f"this cache counts positions up to {limit}: it has had {self.tokens} tokens and "
                f"{tokens} more came. The model and its configuration speak of fewer. For longer "
                "texts call arkv_fx.restore(model) and arkv_fx.transform(model, "
                "ArkvConfig(context=N)), N the tokens to come, and begin with a new cache"
            )

    def counts(self, tokens: Tensor) -> bool:
        """Whether exactly ``tokens`` [B] tokens of each sequence were taken for real ones."""
        if not self.layers:
            return True
        found = torch.stack([state["count"] for state in self.layers.values()])
        return bool((found == tokens.to(found)).all())  # one look for all layers

    def nbytes(self) -> int:
        """Bytes of every tensor of every layer, the handle and what is kept to go back included."""
        kept = self.journal.nbytes() if self.journal is not None else 0
        return sum(part.nbytes() for part in self.parts()) + int(self.handle.nbytes) + kept

    def parts(self) -> list[LayerState | PlainLayer]:
        """The states of all layers, compressed and plain."""
        return [*self.layers.values(), *self.plain.values()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """A sequence of its own that goes on from here (prefix reuse): own tensors and handle."""
        twin = Session(self.owner)
        twin.tokens, twin.mask = self.tokens, self.mask
        twin.journal = self.journal and self.journal.twin()
        twin.layers.update({index: state.clone() for index, state in self.layers.items()})
        twin.plain.update({index: plain.clone() for index, plain in self.plain.items()})
        return twin

    def select(self, sequences: Tensor) -> None:
        """Keep these of the sequences, given by number; none of their tokens can be taken back."""
        self.journal = self.journal and self.journal.twin()
        for part in self.parts():
            part.select(sequences)

    def reset(self) -> None:
        """Forget everything."""
        self.tokens, self.mask, self.journal = 0, None, self.journal and self.journal.twin()
        self.layers.clear()
        self.plain.clear()


def find_session(handle: Tensor | int) -> Session:
    """The session of a handle.

    Raises:
        CacheError: if its cache has been freed.
    """
    session = _sessions.get(int(handle))
    if session is None:
        raise CacheError(
            f"no cache with handle {int(handle)}: it has been freed; keep a reference to the "
            "ArkvCache while its sequence goes on"
        )
    return session
