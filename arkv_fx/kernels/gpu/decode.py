"""Split decode attention: each program takes one kv head and a chunk of one segment's slots.

All query heads of the kv head are rows of one tile, so each code is read once. Codes stay codes:
scales multiply logits and probabilities, zero points are a rank-one term of each product.
"""

import triton
import triton.language as tl

from arkv_fx.kernels.gpu.tiles import columns, load_codes, load_scale, load_zero


@triton.constexpr_function
def factor_type(stored, model, for_codes):
    """The type in which the tensor core multiplies what is stored; every code is exact in it."""
    if model == tl.float32 or not stored.is_floating():
        return model if model == tl.float32 else for_codes
    # A float16 query has digits that bfloat16 has not.
    return stored if stored == model else tl.float32


@triton.constexpr_function
def at(values, index):
    """An element of a tuple of constants, as a constant: for Triton 3.6 `values[index]` is none."""
    return values[index]


@triton.jit(do_not_specialize=["slots", "chunk", "splits"])  # one compilation for all lengths
def decode(
    segments, slots, lowest, bias, logits, parts, lse, scale, chunk, splits,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, K_CODECS: tl.constexpr, V_CODECS: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS_GROUPS: tl.constexpr, MODEL: tl.constexpr, ROUND_ONLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hkv, splits).

    Args:
        segments: per segment (query [B, Hkv, G, Dk] float32, centre logits [B, Hkv, G] or None,
            key fields, value fields, pos).
        slots: per segment; the first cdiv(slots[0], chunk) programs of a head are the ring's.
        lowest: [B] int32; bias: [B, Hkv, BIAS_GROUPS, N] float32 or None.
        logits: [B, Hkv, G, N] float32 out, N all slots and one column that is left alone.
        parts: [B, Hkv, G, splits, Dv] float32 out, each split's output in the stored basis.
        lse: [B, Hkv, G, splits] float32 out, each split's log-sum-exp, -inf if it saw nothing.
        ROWS: G, padded to what a tensor core takes.
        ROUND_ONLY: round to the narrow type but multiply in float32; the interpreter's product of
            bfloat16 numbers is wrong.
    """
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    total_slots = 0
    for s in tl.static_range(len(K_CODECS)):
        total_slots += slots[s]
    before_splits = 0
    before_slots = 0
    for s in tl.static_range(len(K_CODECS)):
        first = (split - before_splits) * chunk
        if (first >= 0) & (first < slots[s]):
            attend_chunk(
                segments[s], slots[s], first, tl.minimum(first + chunk, slots[s]),
                lowest + head // HEADS, bias, logits, before_slots, total_slots + 1,
                parts, lse, scale, head, split, splits, GROUPS, ROWS, K_DIM, V_DIM,
                at(K_CODECS, s), at(V_CODECS, s), SOFTCAP, BIAS_GROUPS, MODEL, ROUND_ONLY, BLOCK,
            )  # fmt: skip
        before_splits += tl.cdiv(slots[s], chunk)
        before_slots += slots[s]


@triton.jit
def attend_chunk(
    segment, slots, first, last, lowest, bias, logits, column, width, parts, lse, scale, head,
    split, splits, GROUPS: tl.constexpr, ROWS: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, K_CODEC: tl.constexpr, V_CODEC: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS_GROUPS: tl.constexpr, MODEL: tl.constexpr, ROUND_ONLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots [first, last) of one segment and head; the segment's logits begin at ``column``."""
    query, centre, k, v, pos = segment
    # A rotated query needs float16's digits; a probability times a scale, bfloat16's range.
    K_TYPE: tl.constexpr = factor_type(k[0].dtype.element_ty, MODEL, tl.float16)
    V_TYPE: tl.constexpr = factor_type(v[0].dtype.element_ty, MODEL, tl.bfloat16)
    group = tl.arange(0, ROWS)
    real = group < GROUPS
    row = head * GROUPS  # 64 bits, so only ever one number and not a tensor of them
    k_element, k_there = columns(K_DIM, K_CODEC)
    v_element, v_there = columns(V_DIM, V_CODEC)
    q = tl.load(
        query + row * K_DIM + group[:, None] * K_DIM + k_element[None, :],
        mask=real[:, None] & k_there[None, :], other=0.0,
    )  # fmt: skip
    factor = tl.full([ROWS], scale, tl.float32)
    if len(k) > 1:  # there are codes, not numbers: bring the query into float16's range
        largest = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)
        q = q / largest[:, None]
        factor *= largest
    q = q.to(K_TYPE)
    # The zero point takes its share off the logit of the same, rounded, query.
    q_sum = tl.sum(q.to(tl.float32), 1)
    common = tl.zeros([ROWS], tl.float32)
    if centre is not None:
        common = tl.load(centre + row + group, mask=real, other=0.0) * scale
    seen_from = tl.load(lowest)
    base = head * slots
    logits += row * width + column
    if bias is not None:
        bias += head * BIAS_GROUPS * width + column

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    shift = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, v_element.shape[0]], tl.float32)
    for start in range(first, last, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < last
        # Everything that is read comes before its first use: one wait for memory per block.
        keys = load_codes(k, base, slot, inside, K_DIM, K_CODEC)
        values = load_codes(v, base, slot, inside, V_DIM, V_CODEC)
        k_scale = load_scale(k, base, slot, inside, K_CODEC)
        k_zero = load_zero(k, base, slot, inside, K_CODEC)
        v_scale = load_scale(v, base, slot, inside, V_CODEC)
        v_zero = load_zero(v, base, slot, inside, V_CODEC)
        shown = tl.load(pos + base + slot, mask=inside, other=-1) > seen_from

        logit = product(q, tl.trans(keys), ROUND_ONLY)
        logit = (logit - q_sum[:, None] * k_zero[None, :]) * k_scale[None, :]
        logit = logit * factor[:, None] + common[:, None]
        if SOFTCAP > 0:
            # tanh(x) = 2 sigmoid(2 x) - 1
            logit = (2 * tl.sigmoid(logit * (2 / SOFTCAP)) - 1) * SOFTCAP
        if bias is not None:
            logit += tl.load(
                bias + (group if BIAS_GROUPS > 1 else group * 0)[:, None] * width + slot[None, :],
                mask=real[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
        logit = tl.where(shown[None, :], logit, float("-inf"))
        tl.store(
            logits + group[:, None] * width + slot[None, :], logit,
            mask=real[:, None] & inside[None, :],
        )  # fmt: skip

        risen = tl.maximum(top, tl.max(logit, 1))
        finite = tl.where(risen == float("-inf"), 0.0, risen)
        p = tl.exp(logit - finite[:, None])
        fade = tl.exp(top - finite)
        top = risen
        total = total * fade + tl.sum(p, 1)
        weight = (p * v_scale[None, :]).to(V_TYPE)
        shift = shift * fade + tl.sum(weight.to(tl.float32) * v_zero[None, :], 1)
        out = out * fade[:, None] + product(weight, values, ROUND_ONLY)

    saw = total > 0
    total = tl.where(saw, total, 1.0)
    out = (out - shift[:, None]) / total[:, None]
    lse += row * splits + split
    parts += (row * splits + split) * V_DIM
    tl.store(lse + group * splits, tl.where(saw, top + tl.log(total), float("-inf")), mask=real)
    tl.store(
        parts + group[:, None] * splits * V_DIM + v_element[None, :], out,
        mask=real[:, None] & v_there[None, :],
    )  # fmt: skip


@triton.jit
def product(a, codes, ROUND_ONLY: tl.constexpr):
    """Matrix product in a's type, float32 sums; float32 factors keep their precision.

    What is stored in less than float32 is exact in bfloat16, and float32 is the sum of three
    bfloat16 numbers: half the instructions and registers of float32 itself.
    """
    if a.dtype != tl.float32:
        return rounded_product(a, codes, ROUND_ONLY)
    if codes.dtype == tl.float32:
        return tl.dot(a, codes, input_precision="tf32x3")
    most = a.to(tl.bfloat16)
    rest = a - most.to(tl.float32)
    more = rest.to(tl.bfloat16)
    least = (rest - more.to(tl.float32)).to(tl.bfloat16)
    found = rounded_product(least, codes, ROUND_ONLY)  # the small ones first
    found += rounded_product(more, codes, ROUND_ONLY)
    return found + rounded_product(most, codes, ROUND_ONLY)


@triton.jit
def rounded_product(a, codes, ROUND_ONLY: tl.constexpr):
    """Matrix product in a's narrow type, float32 sums."""
    if ROUND_ONLY:
        return tl.dot(a.to(tl.float32), codes.to(tl.float32))
    return tl.dot(a, codes.to(a.dtype))
