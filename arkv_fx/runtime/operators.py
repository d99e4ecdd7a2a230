"""Operators that an export target replaces by its own: what they compute.

Graphs that leave torch carry these instead of casts and products, so that a target can read codes
where they lie: ONNX makes each of them one (De)QuantizeLinear; and instead of a whole sort where
the best are enough: TopK. Views of bits are among them, too: ONNX has none before opset 26.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

# Not ContextVars, which Dynamo cannot read.
_leaving = False
_most_sorted = 0


def leaving_torch() -> bool:
    """Whether the graph that is traced is one that leaves torch.

    Not only ``torch.compiler.is_exporting``: before torch 2.13 that is true in every graph.
    """
    return _leaving and torch.compiler.is_exporting()


@contextmanager
def traced_to_leave(most_sorted: int = 0) -> Generator[None]:
    """Within it ``torch.export`` traces a graph that leaves torch; one at a time in a process.

    Args:
        most_sorted: of how many the graph's compiler gives the best at once, 0 if of any number.
    """
    global _leaving, _most_sorted
    _leaving, _most_sorted = True, most_sorted
    try:
        yield
    finally:
        _leaving, _most_sorted = False, 0


def _widen(codes: Tensor) -> Tensor:
    return codes.to(torch.float32, copy=True)


def _dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(torch.float32) * scale


def _to_e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn, copy=True)


def _as_float32(codes: Tensor, scale: Tensor | None = None) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _as_e4m3(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


def _best(rank: Tensor, count: int) -> Tensor:
    # Not topk: which of equals it takes is not defined.
    return rank.argsort(dim=-1, descending=True, stable=True)[..., :count].contiguous()


def _as_indices(rank: Tensor, count: int) -> Tensor:
    return rank.new_empty((*rank.shape[:-1], count), dtype=torch.int64)


def _to_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int8).clone()


def _as_bytes(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] * x.dtype.itemsize), dtype=torch.int8)


def _from_bytes(held: Tensor, dtype: torch.dtype) -> Tensor:
    return held.contiguous().view(dtype).to(torch.float32)


def _as_numbers(held: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (*held.shape[:-1], held.shape[-1] // dtype.itemsize)
    return held.new_empty(shape, dtype=torch.float32)


def _grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    out = rows.new_zeros(rows.shape[0], weights.shape[2])
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        out[begin:end] = rows[begin:end] @ weights[expert]
        begin = end
    return out


def _as_rows(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weights.shape[2]))


_library = torch.library.Library("arkv", "FRAGMENT")
for _name, _arguments, _run, _fake in (
    ("widen", "Tensor codes", _widen, _as_float32),
    ("dequantize", "Tensor codes, Tensor scale", _dequantize, _as_float32),
    ("to_e4m3", "Tensor x", _to_e4m3, _as_e4m3),
    ("best", "Tensor rank, int count", _best, _as_indices),
    ("to_bytes", "Tensor x", _to_bytes, _as_bytes),
    ("from_bytes", "Tensor held, ScalarType dtype", _from_bytes, _as_numbers),
    ("grouped_mm", "Tensor rows, Tensor weights, Tensor ends", _grouped_mm, _as_rows),
):
    _library.define(f"{_name}({_arguments}) -> Tensor")
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"arkv::{_name}", _fake, lib=_library)


def widen(codes: Tensor) -> Tensor:
    """Codes (int8 or float8 e4m3) of any shape as float32."""
    out: Tensor = torch.ops.arkv.widen(codes)
    return out


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [..., D] (int8 or float8 e4m3) times scale [..., 1] float32, in float32."""
    out: Tensor = torch.ops.arkv.dequantize(codes, scale)
    return out


def to_e4m3(x: Tensor) -> Tensor:
    """float32 numbers in -448..448 as float8 e4m3."""
    out: Tensor = torch.ops.arkv.to_e4m3(x)
    return out


def best(rank: Tensor, count: int) -> Tensor:
    """int64 indices [..., count] of the largest of rank [..., N >= count]; of equals the first."""
    if _most_sorted and count > _most_sorted:
        return best_in_runs(rank, count, _most_sorted)
    out: Tensor = torch.ops.arkv.best(rank, count)
    return out


def best_in_runs(rank: Tensor, count: int, most: int) -> Tensor:
    """What ``best`` gives, ``most`` at a time: the best, then the best of the rest.

    Ranks may be -inf: what is taken already falls below that of no token.
    """
    rank = rank.float().clamp(min=torch.finfo(torch.float32).min)
    index = torch.arange(rank.shape[-1], device=rank.device)
    runs: list[Tensor] = []
    for begin in range(0, count, most):
        run: Tensor = torch.ops.arkv.best(rank, min(most, count - begin))
        runs.append(run)
        rank = torch.where(is_best(rank, run, index), float("-inf"), rank)
    return torch.cat(runs, -1)


def is_best(rank: Tensor, winners: Tensor, index: Tensor) -> Tensor:
    """Which of rank [..., N] are among ``best(rank, ..)`` [..., M]; index: 0 to N - 1."""
    if _most_sorted:  # TensorRT does not say which of equals come first
        ones = torch.ones_like(winners, dtype=rank.dtype)
        return torch.zeros_like(rank).scatter(-1, winners, ones) > 0
    last = winners[..., -1:]
    least = rank.gather(-1, last)
    return (rank > least) | ((rank == least) & (index <= last))


def to_bytes(x: Tensor) -> Tensor:
    """bfloat16 or float8 e4m3 numbers [..., D] as their bytes, int8 [..., D * itemsize]."""
    out: Tensor = torch.ops.arkv.to_bytes(x)
    return out


def from_bytes(held: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``to_bytes`` for numbers of ``dtype``, in float32."""
    out: Tensor = torch.ops.arkv.from_bytes(held, dtype)
    return out


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows [S, D] sorted by expert times weights [E, D, F]; expert e's end at ends[e]: [S, F]."""
    out: Tensor = torch.ops.arkv.grouped_mm(rows, weights, ends)
    return out
