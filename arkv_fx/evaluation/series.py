"""Numbers by position that change little from step to step: only what changes is kept."""

from __future__ import annotations

import base64
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class Series:
    """One whole number for each position after each step; new positions may come with a step.

    What has not been said yet of a position is 0.
    """

    def __init__(self) -> None:
        self._last: Numbers = np.zeros(0, np.int64)
        self._steps: list[tuple[int, Numbers, Numbers]] = []  # length, positions, differences

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, numbers: Numbers) -> None:
        """The next step: ``numbers`` [P], P no smaller than it was."""
        before = np.zeros(len(numbers), np.int64)
        before[: len(self._last)] = self._last
        changed = np.flatnonzero(numbers != before)
        self._steps.append((len(numbers), changed, (numbers - before)[changed]))
        self._last = numbers.copy()

    def at(self, step: int) -> Numbers:
        """The numbers [P] after a step, the first of which is 0."""
        out: Numbers = np.zeros(self._steps[step][0], np.int64)
        for _, positions, differences in self._steps[: step + 1]:
            out[positions] += differences
        return out

    def packed(self) -> str:
        """Base64 of variable-length numbers (LEB128).

        For each step: how many positions change, and for each of them how many are between it and
        the one before, and the difference, zigzag: 0, -1, 1, -2, ... are 0, 1, 2, 3, ...
        """
        out = bytearray()
        for _, positions, differences in self._steps:
            gaps = np.diff(positions, prepend=-1) - 1
            zigzag = np.where(differences < 0, -2 * differences - 1, 2 * differences)
            _write(out, (len(positions),))
            _write(out, np.stack([gaps, zigzag], -1).ravel().tolist())
        return base64.b64encode(out).decode()


def _write(out: bytearray, numbers: Iterable[int]) -> None:
    for number in numbers:
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)
