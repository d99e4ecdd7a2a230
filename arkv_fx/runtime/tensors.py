"""State tensors between numpy and ONNX Runtime; numpy lacks two of their dtypes."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arkv_fx.errors import EngineError

# numpy's dtype of the same width, and the dtype's number in onnx.proto where numpy has none.
DTYPES: dict[str, tuple[Any, int | None]] = {
    "int32": (np.int32, None),
    "int8": (np.int8, None),
    "float32": (np.float32, None),
    "float16": (np.float16, None),
    "bfloat16": (np.uint16, 16),
    "float8_e4m3fn": (np.uint8, 17),
}


@dataclass(frozen=True)
class TensorInfo:
    """A state tensor: its names going in and coming out, [layers, batch, ...] or [batch, ...]."""

    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str
    fill: int

    @property
    def stored(self) -> Any:
        """numpy's dtype for it."""
        return np.dtype(DTYPES[self.dtype][0])

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return int(math.prod(self.shape) * self.stored.itemsize)


def empty(runtime: Any, info: TensorInfo) -> Any:
    """The OrtValue before the first token."""
    return from_numpy(runtime, np.full(info.shape, info.fill, info.stored), info)


def from_numpy(runtime: Any, array: NDArray[Any] | None, info: TensorInfo) -> Any:
    """An OrtValue of an array.

    Raises:
        EngineError: if it is None or of another shape or dtype.
    """
    if array is None:
        raise EngineError(f"the state lacks {info.input}")
    if array.shape != info.shape or array.dtype != info.stored:
        raise EngineError(
            f"{info.input} is {array.dtype} {array.shape}; the graph takes {info.dtype} "
            f"(as {info.stored}) {info.shape}"
        )
    number = DTYPES[info.dtype][1]
    array = np.ascontiguousarray(array)
    if number is None:
        return runtime.OrtValue.ortvalue_from_numpy(array)
    return runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)


def to_numpy(value: Any, info: TensorInfo) -> NDArray[Any]:
    """A copy of an OrtValue; what numpy has no dtype for, as integers of the same width."""
    if DTYPES[info.dtype][1] is None:
        found: NDArray[Any] = value.numpy().copy()  # it may look into memory that ends with value
        return found
    raw = ctypes.string_at(value.data_ptr(), info.nbytes)
    return np.frombuffer(raw, info.stored).reshape(info.shape)
