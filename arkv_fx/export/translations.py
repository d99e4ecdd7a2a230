"""Operators that torch's ONNX exporter does not know, or writes otherwise, in opset 21."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21

import arkv_fx.ops.codes  # noqa: F401  (registers the operators)

op: Any = opset21  # its types are narrower than what it takes
FLOAT8 = ir.DataType.FLOAT8E4M3FN


def _widen(codes: Any) -> Any:
    """One scale for all: 1."""
    return op.DequantizeLinear(codes, op.Constant(value_float=1.0))


def _dequantize(codes: Any, scale: Any) -> Any:
    """A scale for each vector: the last axis is one block."""
    return op.DequantizeLinear(codes, scale, axis=-1, block_size=codes.shape[-1])


def _to_e4m3(x: Any) -> Any:
    return op.QuantizeLinear(x, op.Constant(value_float=1.0), output_dtype=FLOAT8)


def _argsort(x: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """Of equals, TopK too gives the first one first."""
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    _, order = op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)
    return order


def _searchsorted(
    sorted_sequence: Any, values: Any, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Any = None,
) -> Any:  # fmt: skip
    """How many are smaller."""
    row, column = op.Constant(value_ints=[-2]), op.Constant(value_ints=[-1])
    smaller = op.Less(op.Unsqueeze(sorted_sequence, row), op.Unsqueeze(values, column))
    return op.ReduceSum(op.Cast(smaller, to=ir.DataType.INT64), column, keepdims=0)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.arkv.widen.default: _widen,
    torch.ops.arkv.dequantize.default: _dequantize,
    torch.ops.arkv.to_e4m3.default: _to_e4m3,
    torch.ops.aten.argsort.stable: _argsort,
    torch.ops.aten.searchsorted.Tensor: _searchsorted,
}
"""For ``torch.onnx.export(custom_translation_table=...)``."""
