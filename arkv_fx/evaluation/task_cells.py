"""The cells of a run of tasks: what is asked, and how long the rest of them may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from arkv_fx.evaluation.answering import length
from arkv_fx.evaluation.fidelity import Entry
from arkv_fx.evaluation.tasks import Sample, Task

CHARACTERS = 12
"""Of a text for each token that is asked for: no tokenizer reads so many as one token."""


@dataclass(frozen=True)
class Cell:
    """One task at one length: what is measured, and written, at a time."""

    task: Task
    tokens: int
    samples: Sequence[Sample]
    missing: Sequence[Entry]
    """Methods that have no row of it yet."""
    full_bytes: int
    """Of a full bf16 cache of so many tokens."""


def drawn(
    contents: Mapping[str, str], task: str, tokens: int, seed: int, index: int
) -> tuple[str, int, Random]:
    """A text that begins at a sentence of its own for each prompt, tokens, and what draws."""
    random = Random(f"{seed} {task} {tokens} {index}")
    every = list(contents.values())
    first = index % len(every)
    text = "\n\n".join((*every[first:], *every[:first]))
    cut = random.randrange(len(every[first]) // 2 + 1)
    begins = text.find(". ", cut) + 2
    turned = text[begins:] + "\n\n" + text[:begins]
    return turned[: CHARACTERS * tokens], tokens, random


class Clock:
    """What is done next, and how long the rest may take, by what was done so far.

    The first prompt does not count: the model is traced and rewritten in it.
    """

    def __init__(self, cells: Sequence[Cell], progress: Callable[[str], None]) -> None:
        self.progress, self.began, self.units = progress, 0.0, 0
        self.left = sum(self._units(cell) * len(cell.samples) for cell in cells)

    @staticmethod
    def _units(cell: Cell) -> int:
        """Of one prompt: its tokens, and its answers by every method, which cost more."""
        return cell.tokens + 8 * (1 + len(cell.missing)) * length(cell.samples[0])

    def say(self, what: str) -> None:
        """What is done next."""
        if self.units:
            rest = self.left * (time.monotonic() - self.began) / self.units
            what += (
                f"; about {rest / 60:.0f} min left" if rest > 90 else f"; about {rest:.0f} s left"
            )
        self.progress(what)

    def done(self, cell: Cell) -> None:
        """One prompt of a cell."""
        self.left -= self._units(cell)
        if self.began:
            self.units += self._units(cell)
        else:
            self.began = time.monotonic()
