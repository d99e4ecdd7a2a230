"""Operators that torch's ONNX exporter does not know, or writes otherwise, in opset 21."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21

import arkv_fx.runtime.operators  # noqa: F401  (registers the operators)

op: Any = opset21  # its types are narrower than what it takes
FLOAT8 = ir.DataType.FLOAT8E4M3FN
LONGEST = 2**31 - 1
"""From here on an end means that of the dimension."""


@dataclass(frozen=True)
class Bits:
    """A float format: bits of the mantissa, the least exponent of a normal number, the largest
    number.
    """

    mantissa: int
    least: int
    most: float


BITS = {
    ir.DataType.BFLOAT16: Bits(7, -126, torch.finfo(torch.bfloat16).max),
    FLOAT8: Bits(3, -6, torch.finfo(torch.float8_e4m3fn).max),
}


def _to_bytes(x: Any) -> Any:
    """By arithmetic: opset 21 has no view of bits.

    The exponent is that of the logarithm, whose error is far below the 1 / 512 by which it is
    raised: that is less than the logarithm of the number next below a power of two falls short.
    """
    bits, wide = BITS[x.dtype], op.Cast(x, to=ir.DataType.FLOAT)
    size = op.Min(op.Abs(wide), _number(bits.most))
    log2 = op.Mul(op.Log(op.Max(size, _number(2.0**bits.least))), _number(math.log2(math.e)))
    exponent = op.Floor(op.Add(log2, _number(1 / 512)))
    powers = 2.0 ** np.arange(bits.least, math.frexp(bits.most)[1], dtype=np.float64)
    place = op.Cast(op.Sub(exponent, _number(float(bits.least))), to=ir.DataType.INT32)
    place = op.Clip(place, _integer(0), _integer(len(powers) - 1))  # that of NaN is anything
    steps = op.Mul(op.Div(size, op.Gather(_table(powers), place)), _number(2.0**bits.mantissa))
    code = op.Add(op.Mul(place, _integer(2**bits.mantissa)), op.Cast(steps, to=ir.DataType.INT32))
    minus = op.Less(wide, _number(0.0))
    if x.dtype == FLOAT8:  # a byte less 256 is the same byte with a sign
        signed = op.Where(minus, op.Sub(code, _integer(128)), code)
        return op.Cast(signed, to=ir.DataType.INT8)
    high = op.Div(code, _integer(256))
    low = op.Sub(code, op.Mul(high, _integer(256)))
    low = op.Where(op.Less(low, _integer(128)), low, op.Sub(low, _integer(256)))
    high = op.Where(minus, op.Sub(high, _integer(128)), high)
    if x.shape[-1] == 1:
        return op.Cast(op.Concat(low, high, axis=-1), to=ir.DataType.INT8)
    last = op.Constant(value_ints=[-1])
    pairs = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    return op.Cast(op.Reshape(pairs, _shape(x, -1)), to=ir.DataType.INT8)


def _from_bytes(held: Any, dtype: int) -> Any:
    """Looked up; a number of two bytes is the product of what each of them says.

    Bfloat16 below 2^-125, of which there are none but zeros, is read as zero.
    """
    if ir.DataType(dtype) == FLOAT8:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
        return op.Gather(_table(every), op.Cast(_widen(held), to=ir.DataType.INT32))
    code = np.arange(256)
    lows = 2.0 ** (code >> 7) * (1 + (code & 127) / 128)
    highs = np.where(code & 127, 2.0 ** (2 * (code & 127) - 127.0), 0) * (1 - 2.0 * (code >> 7))
    index = op.Cast(held, to=ir.DataType.INT32)
    if held.shape[-1] > 2:
        index = op.Reshape(index, _shape(held, held.shape[-1] // 2, 2))
    limits = [[op.Constant(value_ints=[x]) for x in (i, i + 1, -1)] for i in range(2)]
    low, high = (op.Slice(index, *limit) for limit in limits)
    found = op.Mul(op.Gather(_table(lows), low), op.Gather(_table(highs), high))
    return op.Reshape(found, _shape(held, -1)) if held.shape[-1] > 2 else found


def _shape(x: Any, *last: int) -> Any:
    """The shape of ``x`` with others in place of its last extent."""
    return op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=list(last)), axis=0)


def _table(numbers: Any) -> Any:
    """Looked up by bytes with their signs: a negative index counts from the end."""
    return op.Constant(value=ir.tensor(np.asarray(numbers, np.float32)))


def _number(value: float) -> Any:
    return op.Constant(value_float=value)


def _integer(value: int) -> Any:
    return op.Constant(value=ir.tensor(np.int32(value)))


def _widen(codes: Any) -> Any:
    """One scale for all: 1."""
    return op.DequantizeLinear(codes, op.Constant(value_float=1.0))


def _dequantize(codes: Any, scale: Any) -> Any:
    """A scale for each vector: the last axis is one block."""
    if codes.dtype == ir.DataType.FLOAT:  # looked up by their bytes
        return op.Mul(codes, scale)
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


def _grouped_mm(rows: Any, weights: Any, ends: Any) -> Any:
    ends = op.Cast(ends, to=ir.DataType.INT64)
    start, parts = op.Constant(value_ints=[0]), []
    for expert in range(weights.shape[0]):
        end = op.Gather(ends, op.Constant(value_ints=[expert]))
        own = op.Slice(rows, start, end, op.Constant(value_ints=[0]))
        parts.append(op.MatMul(own, op.Gather(weights, op.Constant(value_int=expert))))
        start = end
    return op.Concat(*parts, axis=0)


def _own_grouped_mm(
    rows: Any, weights: Any, offs: Any = None, bias: Any = None, out_dtype: int | None = None
) -> Any:
    """torch's own, which transformers takes in bfloat16."""
    known = offs is not None and bias is None and out_dtype is None
    if not known or (len(rows.shape), len(weights.shape)) != (2, 3):
        raise NotImplementedError("only rows by expert are translated")
    return _grouped_mm(rows, weights, offs)


def _histc(x: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """Of whole numbers, one bin each, as experts are counted."""
    if max - min != bins - 1:
        raise NotImplementedError("only one bin for each whole number is translated")
    wanted = op.Range(*(_number(float(value)) for value in (min, max + 1, 1)))
    same = op.Equal(op.Unsqueeze(x, op.Constant(value_ints=[-1])), wanted)
    zero = op.Constant(value_ints=[0])
    return op.ReduceSum(op.Cast(same, to=ir.DataType.FLOAT), zero, keepdims=0)


def _where(condition: Any, x: Any, y: Any) -> Any:
    """ONNX Runtime selects signed bytes only in new versions, unsigned ones in all."""
    if x.dtype != ir.DataType.INT8:
        return op.Where(condition, x, y)
    x, y = (op.Cast(part, to=ir.DataType.UINT8) for part in (x, y))
    return op.Cast(op.Where(condition, x, y), to=ir.DataType.INT8)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.arkv.widen.default: _widen,
    torch.ops.arkv.dequantize.default: _dequantize,
    torch.ops.arkv.to_e4m3.default: _to_e4m3,
    torch.ops.arkv.best.default: _best,
    torch.ops.arkv.to_bytes.default: _to_bytes,
    torch.ops.arkv.from_bytes.default: _from_bytes,
    torch.ops.aten.diagonal.default: _diagonal,
    torch.ops.aten.slice_scatter.default: _slice_scatter,
    torch.ops.aten.hstack.default: _hstack,
    torch.ops.aten.searchsorted.Tensor: _searchsorted,
    torch.ops.aten.histc.default: _histc,
    torch.ops.arkv.grouped_mm.default: _grouped_mm,
    torch.ops.aten._grouped_mm.default: _own_grouped_mm,
}
"""For ``torch.onnx.export(custom_translation_table=...)``."""
PORTABLE = TABLE | {torch.ops.aten.where.self: _where}
"""The same for graphs that ONNX Runtime runs: TensorRT fuses the selection of signed bytes."""
