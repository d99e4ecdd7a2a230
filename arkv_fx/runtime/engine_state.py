"""The state of a session in a GPU's memory, twice: an engine reads one set and writes the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arkv_fx.runtime.cuda_device import Context, CudaDevice
from arkv_fx.runtime.engine_files import EngineFile
from arkv_fx.runtime.graph_session import State
from arkv_fx.runtime.tensors import TensorInfo, empty, refuse_spoilt


@dataclass(frozen=True)
class Piece:
    """What an engine takes as one tensor: a state tensor, or a layer of one. An address a set."""

    info: TensorInfo
    place: int
    addresses: tuple[int, int]


class EngineState:
    """``held`` is the set, 0 or 1, in which the state lies."""

    def __init__(
        self, device: CudaDevice, tensors: Sequence[TensorInfo], engine: EngineFile
    ) -> None:
        self._device, self._tensors = device, tensors
        self.held = 0
        self._parts = {t.input: sum(of == t.input for of, _ in engine.pieces) for t in tensors}
        self._pieces = [
            Piece(t, place, (device.allocate(size), device.allocate(size)))
            for t in tensors
            for place in range(self._parts[t.input])
            for size in [t.nbytes // self._parts[t.input]]
        ]
        self._flags = [(t, empty(t)) for t in tensors if t.input.endswith(".bad")]

    def bind(self, context: Context, engine: EngineFile) -> None:
        """Let an engine read the set that is held, if it reads any, and write the other."""
        for piece in self._pieces:
            read, written = piece.addresses[self.held], piece.addresses[1 - self.held]
            for name, address in ((piece.info.input, read), (piece.info.output, written)):
                if (name, piece.place) in engine.pieces:
                    context.bind(engine.pieces[name, piece.place], address)

    def swap(self) -> None:
        """Hold what was written."""
        self.held = 1 - self.held

    def queue_flags(self) -> None:
        """Queue the copying of flags of spoilt sequences, of the set that is written."""
        for info, host in self._flags:
            for array, piece in self._cut(info, host):
                self._device.download(array, piece.addresses[1 - self.held])

    def refuse_spoilt(self) -> None:
        """Look at them.

        Raises:
            EngineError: if one is set.
        """
        for info, host in self._flags:
            refuse_spoilt(info, host)

    def empty(self) -> None:
        """Hold the state before the first token."""
        kept = []  # until all is copied
        for info in self._tensors:
            byte, *others = {*np.full((), info.fill, info.dtype).tobytes()}
            if others:
                kept.append(empty(info))
                self._upload(info, kept[-1])
            for piece in [] if others else self._of(info):
                size = info.nbytes // self._parts[info.input]
                self._device.fill(piece.addresses[self.held], byte, size)
        self._device.wait()

    def put(self, state: State) -> None:
        """Hold this."""
        for info, array in zip(self._tensors, state, strict=True):
            self._upload(info, array)
        self._device.wait()

    def copy(self) -> State:
        """What is held."""
        found = [np.empty(info.shape, info.dtype) for info in self._tensors]
        for info, array in zip(self._tensors, found, strict=True):
            for part, piece in self._cut(info, array):
                self._device.download(part, piece.addresses[self.held])
        self._device.wait()
        return found

    def _upload(self, info: TensorInfo, array: NDArray[Any]) -> None:
        for part, piece in self._cut(info, array):
            self._device.upload(piece.addresses[self.held], part)

    def _of(self, info: TensorInfo) -> list[Piece]:
        return [piece for piece in self._pieces if piece.info is info]

    def _cut(self, info: TensorInfo, array: NDArray[Any]) -> Iterator[tuple[NDArray[Any], Piece]]:
        """The parts of a contiguous array, which are views of it, and where each lies."""
        parts = array.reshape(self._parts[info.input], -1)
        return zip(parts, self._of(info), strict=True)
