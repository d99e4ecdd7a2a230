"""What it takes to take tokens back: the state of some tokens ago, and the steps since then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

DEPTH = 32
"""Tokens that can be taken back at least."""
Repeat = Callable[[Sequence[Tensor]], object]
"""Does one token's step again, on the state tensors that it is given."""


@dataclass
class LayerJournal:
    """Of one layer: its state before ``steps``, in tensors of its own, and those that go on."""

    live: Sequence[Tensor]
    base: list[Tensor]
    steps: list[Repeat] = field(default_factory=list)

    def add(self, step: Repeat, depth: int) -> None:
        """A step that was done; of what is older than ``depth`` tokens the state is enough."""
        self.steps.append(step)
        if len(self.steps) >= 2 * depth:
            for old in self.steps[:-depth]:
                old(self.base)
            del self.steps[:-depth]

    def take_back(self, tokens: int) -> None:
        """Let the state be what it was before its last ``tokens`` steps."""
        for now, then in zip(self.live, self.base, strict=True):
            now.copy_(then)
        del self.steps[len(self.steps) - tokens :]
        for step in self.steps:
            step(self.live)


class Journal:
    """Of all layers of a sequence.

    ``candidates`` is how many of the last tokens of the call at hand may be taken back, and no less
    than ``least``; ``depth`` how many tokens can be at any time.
    """

    def __init__(self, least: int = 0) -> None:
        self.layers: dict[int, LayerJournal] = {}
        self.least, self.depth, self.candidates = least, DEPTH, DEPTH

    def twin(self) -> Journal:
        """One that has nothing written in it yet."""
        return Journal(self.least)

    def expect(self, candidates: int) -> None:
        """So many of the last tokens of the next call may be taken back."""
        self.candidates = max(self.least, candidates)
        self.depth = max(self.depth, self.candidates)

    def of(self, state: Sequence[Tensor]) -> LayerJournal:
        """The layer whose state tensors these are; one that is new begins with them."""
        key = state[0].data_ptr()
        if key not in self.layers:
            self.begin(state)
        return self.layers[key]

    def begin(self, state: Sequence[Tensor]) -> None:
        """What is in a layer's state from now on stays."""
        self.layers[state[0].data_ptr()] = LayerJournal(state, [t.clone() for t in state])

    def known(self, state: Sequence[Tensor]) -> int:
        """How many tokens of a layer can be taken back."""
        layer = self.layers.get(state[0].data_ptr())
        return len(layer.steps) if layer is not None else 0

    def nbytes(self) -> int:
        """Bytes of the states kept; the steps are a few tokens."""
        return sum(t.untyped_storage().nbytes() for x in self.layers.values() for t in x.base)


_here = threading.local()


def current() -> Journal | None:
    """The journal of the sequence that this thread is in a step of, if it has one."""
    journal: Journal | None = getattr(_here, "journal", None)
    return journal


@contextmanager
def kept_in(journal: Journal | None) -> Generator[None]:
    """Within it this thread's steps are written into ``journal``."""
    before = current()
    _here.journal = journal
    try:
        yield
    finally:
        _here.journal = before
