"""Tiles of codes, straight from memory to registers: one form for every codec.

A codec stores a vector of D elements as one to eight equal runs that share their bytes (int4: a
low and a high half; int3: eight runs in three bit planes). A thread that reads a byte keeps all
the codes in it: a tile's columns take one element of each run in turn. Queries are read and
outputs are written in that order, so that unpacking moves no number to another thread.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def run_count(codec: str) -> int:
    """Runs of one vector."""
    return {"int4": 2, "int3": 8}.get(codec, 1)


@triton.constexpr_function
def least_inner(codec: str) -> int:
    """Least inner dimension of a product with such a tile.

    A tensor core takes 16. But for what came out of ``tl.join`` Triton gives each of the four
    threads that share a row eight neighbours, and with fewer than 32 some threads get copies,
    which are summed as if they were numbers of their own (seen in 3.6 and 3.7).
    """
    return 32 if run_count(codec) > 1 else 16


@triton.constexpr_function
def run_columns(dim: int, codec: str) -> int:
    """Columns of one run: a power of two, and all together at least ``least_inner``."""
    runs = run_count(codec)
    return max(triton.next_power_of_2(dim // runs), least_inner(codec) // runs)


@triton.constexpr_function
def zero_unit(codec: str) -> float:
    """Codes per unit of the stored zero, see `RotatedAffine`; 0 if the codec has no zero."""
    return {"int4": 15 / 255, "int3": 7 / 255}.get(codec, 0.0)


@triton.constexpr_function
def code_factor(codec: str) -> float:
    """What a tile must still be multiplied by, beside the stored scale."""
    return 256.0 if codec == "fp8" else 1.0


@triton.jit
def columns(DIM: tl.constexpr, CODEC: tl.constexpr):
    """Element [P] of each column of a tile, and whether [P] there is one."""
    RUNS: tl.constexpr = run_count(CODEC)
    column = tl.arange(0, run_columns(DIM, CODEC) * RUNS)
    within = column // RUNS
    return column % RUNS * (DIM // RUNS) + within, within < DIM // RUNS


@triton.jit
def load_codes(fields, base, rows, inside, DIM: tl.constexpr, CODEC: tl.constexpr):
    """The codes [N, P] of the vectors `base + rows` [N], 0 where not `inside`.

    ``base`` is one int64: tensors of 64-bit offsets would take twice the registers.
    """
    WIDTH: tl.constexpr = run_columns(DIM, CODEC)
    RUN: tl.constexpr = DIM // run_count(CODEC)
    ROW: tl.constexpr = 3 * RUN if CODEC == "int3" else RUN
    within = tl.arange(0, WIDTH)[None, :]
    shown = inside[:, None] & (within < RUN)
    at = fields[0] + base * ROW + rows[:, None] * ROW + within
    tile = tl.load(at, mask=shown, other=0)
    if CODEC == "int3":
        middle = tl.load(at + RUN, mask=shown, other=0)
        high = tl.load(at + 2 * RUN, mask=shown, other=0)
        tile = _bits(tile) | _bits(middle) << 1 | _bits(high) << 2
    elif CODEC == "int4":
        tile = tl.reshape(tl.join(tile & 15, tile >> 4), [rows.shape[0], 2 * WIDTH])
    elif CODEC == "fp8":
        # e4m3 in the bits of float16, smaller by 256: exact, and no hardware needs to know it.
        wide = tile.to(tl.int16)
        tile = ((wide & 0x7F) << 7 | (wide & 0x80) << 8).to(tl.float16, bitcast=True)
    return tile


@triton.jit
def _bits(plane):
    """The bits [N, 8 P] of bytes [N, P], each byte's lowest first."""
    bits = tl.join(plane, plane >> 4)
    bits = tl.join(bits, bits >> 2)
    bits = tl.join(bits, bits >> 1)
    return tl.reshape(bits, [plane.shape[0], 8 * plane.shape[1]]) & 1


@triton.jit
def load_scale(fields, base, rows, inside, CODEC: tl.constexpr):
    """What the codes of the vectors `base + rows` [N] are multiplied by, float32."""
    scale = tl.full([rows.shape[0]], 1.0, tl.float32)
    if len(fields) > 1:
        scale = tl.load(fields[1] + base + rows, mask=inside, other=0.0).to(tl.float32)
    return scale * code_factor(CODEC)


@triton.jit
def load_zero(fields, base, rows, inside, CODEC: tl.constexpr):
    """What is subtracted from the codes of the vectors `base + rows` [N], float32."""
    zero = tl.zeros([rows.shape[0]], tl.float32)
    if len(fields) > 2:
        zero = tl.load(fields[2] + base + rows, mask=inside, other=0).to(tl.float32)
    return zero * zero_unit(CODEC)
