#!/usr/bin/env bash
# Triton 3.7.1 (3.6.0 as well), targets with mma.sync (here sm_90), no GPU needed to see it.
#
# Guess: tl.dot takes an inner dimension of 16 from any operand; its least is 16.
# Behaviour: if an operand comes out of tl.join of 8-bit loads, the compiler gives each of the four
# threads that share a row 8 neighbours (kWidth = 8): 32 in all, of a row that has 16. Two of the four
# hold copies. The one mma of k = 16 then sums the elements 0 to 3 and 8 to 11 twice and leaves 4 to 7
# and 12 to 15 out; the lowering knows copies among a thread's registers, not those among threads. With
# an inner dimension of 32 it is right. On an H100 (torch 2.11, Triton 3.6.0) errors were as large as
# the numbers; Triton's interpreter, which has no threads, is right.
#
# Seen without a GPU:
#   K=16 kWidth=[8] four threads hold 32 of 16; mma 2
#   K=32 kWidth=[8] four threads hold 32 of 32; mma 4
# It fails if the layouts change.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q triton==3.7.1 2>/dev/null
cat >"$work/look.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(w, codes, out, K: tl.constexpr, N: tl.constexpr):
    r, k, n = tl.arange(0, 16), tl.arange(0, K), tl.arange(0, N)
    packed = tl.load(codes + k[:, None] * (N // 2) + tl.arange(0, N // 2)[None, :])
    tile = tl.reshape(tl.join(packed & 15, packed >> 4), [K, N]).to(tl.bfloat16)
    a = tl.load(w + r[:, None] * K + k[None, :]).to(tl.bfloat16)
    tl.store(out + r[:, None] * N + n[None, :], tl.dot(a, tile))


seen = {}
for size in (16, 32):
    types = {"w": "*fp32", "codes": "*u8", "out": "*fp32", "K": "constexpr", "N": "constexpr"}
    source = ASTSource(product, types, {(3,): size, (4,): 16})
    made = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 1}).asm
    widths = set(re.findall(r"dot_op<\{opIdx = [01], parent = #mma\w*, kWidth = (\d+)\}>", made["ttgir"]))
    count = made["ptx"].count("mma.sync.aligned.m16n8k16")
    seen[size] = (sorted(map(int, widths)), count)
    print(f"K={size} kWidth={seen[size][0]} four threads hold {4 * max(seen[size][0])} of {size}; mma {count}")
print(triton.__version__)
assert seen == {16: ([8], 2), 32: ([8], 4)}, "a row of 16 is shared out otherwise now"
PY
"$work/venv/bin/python" "$work/look.py"
