"""State tensors of exported graphs, in dtypes that numpy and every ONNX Runtime binding have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arkv_fx.errors import EngineError

DTYPES = ("int32", "int8", "float32", "float16")


@dataclass(frozen=True)
class TensorInfo:
    """A state tensor: its names going in and coming out, [layers, batch, ...] or [batch, ...].

    ``bytes_of`` names what an int8 tensor holds the bytes of, "" if it holds numbers.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str
    fill: int
    bytes_of: str = ""

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> TensorInfo:
        """What ``arkv.json`` says of one.

        Raises:
            KeyError, TypeError, ValueError: if it is damaged.
        """
        shape = tuple(entry["shape"])
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape {shape}")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"dtype {entry['dtype']!r}")
        names = str(entry["input"]), str(entry["output"])
        return cls(*names, shape, entry["dtype"], int(entry["fill"]), entry["bytes_of"] or "")

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return int(math.prod(self.shape) * np.dtype(self.dtype).itemsize)


def empty(info: TensorInfo) -> NDArray[Any]:
    """The tensor before the first token."""
    return np.full(info.shape, info.fill, info.dtype)


def checked(array: NDArray[Any] | None, info: TensorInfo) -> NDArray[Any]:
    """The array, contiguous.

    Raises:
        EngineError: if it is None or of another shape or dtype.
    """
    if array is None:
        raise EngineError(f"the state lacks {info.input}")
    if not isinstance(array, np.ndarray):
        raise EngineError(f"{info.input} is a {type(array).__name__}; give a numpy array")
    if array.shape != info.shape or array.dtype != info.dtype:
        raise EngineError(
            f"{info.input} is {array.dtype} {array.shape}; the graph takes {info.dtype} "
            f"{info.shape}"
        )
    return np.ascontiguousarray(array)


def refuse_spoilt(info: TensorInfo, flags: NDArray[Any]) -> None:
    """Look at what a graph gave, if it is the flag of a spoilt sequence.

    Raises:
        EngineError: if it is set.
    """
    if info.input.endswith(".bad") and flags.any():
        raise EngineError(
            f"{info.output}: keys or values hold NaN or infinity; look at the model's "
            "dtype. These sequences are spoilt: call reset()"
        )
