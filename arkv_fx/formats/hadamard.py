"""The Hadamard rotation: it spreads an outlier channel over all channels before few-bit codes."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from arkv_fx.runtime.operators import leaving_torch

FEW = 256
"""Vectors: eight sequences of a model of 32 query heads."""


def block(dim: int) -> int:
    """The largest power of two that divides `dim`."""
    return dim & -dim


def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix `[size, size]` in float32; size a power of two.

    H[i, j] = (-1)^popcount(i & j) / sqrt(size): symmetric, and so its own inverse. It is computed
    at each use and not cached, because a cached tensor would leak out of a trace (or into one).
    Compiled on a CPU, that costs 5 us of the 15-27 us of a one-token rotation; log2(size) butterfly
    steps, which Inductor does not fuse, take 30-35 us, and nine times the matmul for 3500 keys.
    """
    index = torch.arange(size, device=device, dtype=torch.int32)
    parity = index[:, None] & index
    for shift in (8, 4, 2, 1):  # folds 16 bits, enough for any head, into the lowest one
        parity = parity ^ (parity >> shift)
    signs: Tensor = 1 - 2 * (parity & 1)
    return signs.to(torch.float32) / math.sqrt(size)


def rotate(x: Tensor) -> Tensor:
    """`x` `[..., D]` times the block-diagonal Hadamard matrix, in float32; its own inverse.

    D = m * 2^k has m blocks of 2^k channels, so an odd D is left as it is.
    """
    if leaving_torch():
        return _by_constant(x)
    size = block(x.shape[-1])
    blocks = x.to(torch.float32).reshape(*x.shape[:-1], -1, size)
    matrix = hadamard(size, x.device)
    if sums_are_faster(x):
        return (blocks[..., None, :] * matrix).sum(-1).reshape(x.shape)  # it is symmetric
    return (blocks @ matrix).reshape(x.shape)


def sums_are_faster(x: Tensor) -> bool:
    """Whether `rotate` had better not multiply matrices: for a decode step's few vectors on CUDA.

    For 8 to 32 of them cuBLAS takes up to 50 us on an H100, and the matrix must be written first.
    A product and a sum become one loop that makes the signs as it goes. Decided from what a trace
    knows, so a number of vectors that is not fixed is many.
    """
    count = x.numel() // x.shape[-1]
    return x.device.type == "cuda" and isinstance(count, int) and count <= FEW


@lru_cache
def constant(dim: int) -> Tensor:
    """The matrix for vectors of `dim`, kept: its bits are no exported graph's business.

    Graphs find it only if it was made before their trace began.
    """
    return hadamard(block(dim), torch.device("cpu"))


def _by_constant(x: Tensor) -> Tensor:
    matrix = constant(x.shape[-1])
    if len(matrix) == x.shape[-1]:
        return x.to(torch.float32) @ matrix
    blocks = x.to(torch.float32).unflatten(-1, (-1, len(matrix)))
    rotated: Tensor = (blocks @ matrix).flatten(-2)
    return rotated
