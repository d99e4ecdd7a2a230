"""Operators that torch's ONNX exporter does not know, or writes otherwise, in opset 21."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21

import arkv_fx.formats.graph_operators  # noqa: F401  (registers the operators)

op: Any = opset21  # its types are narrower than what it takes
FLOAT8 = ir.DataType.FLOAT8E4M3FN
LONGEST = 2**31 - 1
"""From here on an end means that of the dimension."""


def _widen(codes: Any) -> Any:
    """One scale for all: 1."""
    return op.DequantizeLinear(codes, op.Constant(value_float=1.0))


def _dequantize(codes: Any, scale: Any) -> Any:
    """A scale for each vector: the last axis is one block."""
    return op.DequantizeLinear(codes, scale, axis=-1, block_size=codes.shape[-1])


def _to_e4m3(x: Any) -> Any:
    return op.QuantizeLinear(x, op.Constant(value_float=1.0), output_dtype=FLOAT8)


def _best(rank: Any, count: int) -> Any:
    """Of equals, TopK too gives the first one first."""
    _, order = op.TopK(rank, op.Constant(value_ints=[count]), axis=-1, largest=1, sorted=1)
    return order


def _diagonal(x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """Of square matrices in the last two dimensions, as every (N + 1)th number of a row of all."""
    rank = len(x.shape)
    if (offset, dim1 % rank, dim2 % rank) != (0, rank - 2, rank - 1):
        raise NotImplementedError("only the diagonal of the last two dimensions is translated")
    length = op.Shape(x, start=rank - 1)
    lead = op.Shape(x, start=0, end=rank - 2)
    flat = op.Reshape(x, op.Concat(lead, op.Constant(value_ints=[-1]), axis=0))
    one = op.Constant(value_int=1)
    index = op.Range(op.Constant(value_int=0), op.Squeeze(length), one)
    return op.Gather(flat, op.Mul(index, op.Add(length, one)), axis=-1)


def _slice_scatter(
    x: Any, source: Any, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Any:  # fmt: skip
    """What lies before, the new part, and what lies behind."""
    if step != 1:
        raise NotImplementedError("a part with gaps is not translated")

    def part(begin: int, stop: int) -> Any:
        limits = ([value] for value in (begin, stop, dim))
        return op.Slice(x, *(op.Constant(value_ints=limit) for limit in limits))

    length, begin = x.shape[dim], start or 0
    stop = LONGEST if end is None else end
    if isinstance(length, int):
        begin, stop, _ = slice(begin, stop).indices(length)
    elif stop < LONGEST:
        raise NotImplementedError("a part that ends within a dimension of any length")
    else:
        length = stop
    parts = [part(0, begin)] if begin else []
    parts += [source, part(stop, length)] if stop < length else [source]
    return op.Concat(*parts, axis=dim) if len(parts) > 1 else op.Identity(source)


def _hstack(tensors: Any) -> Any:
    """Without the sequences that torch's exporter makes of it, which TensorRT does not take."""
    rank = len(tensors[0].shape)
    if not rank:
        raise NotImplementedError("a row of numbers is not translated")
    return op.Concat(*tensors, axis=min(rank - 1, 1))


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
    torch.ops.arkv.best.default: _best,
    torch.ops.aten.diagonal.default: _diagonal,
    torch.ops.aten.slice_scatter.default: _slice_scatter,
    torch.ops.aten.hstack.default: _hstack,
    torch.ops.aten.searchsorted.Tensor: _searchsorted,
}
"""For ``torch.onnx.export(custom_translation_table=...)``."""
