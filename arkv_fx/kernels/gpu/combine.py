"""What the splits saw, put together: one softmax over all of them and the new token."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots", "chunk", "splits", "width"])
def combine(
    probs, parts, lse, own, sinks, outs, slots, chunk, splits, width, HEADS: tl.constexpr,
    V_DIM: tl.constexpr, V_COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hq, blocks of the N columns + segments): first the blocks, then the segments.

    Args:
        probs: [B, Hq, N] float32, the slots' logits in, probabilities out, the new token's last.
        parts, lse: of ``decode``.
        own: [B, Hq] float32, the new token's logit; sinks: [Hq] float32 or None.
        outs: [segments, B, Hq, Dv] float32, each segment's sum of probability times stored value.
        SPLITS: ``splits`` padded to a power of two; STEP of them are read at once.
    """
    row = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)
    index = tl.arange(0, SPLITS)
    seen = tl.load(lse + row * splits + index, mask=index < splits, other=float("-inf"))
    own_logit = tl.load(own + row)
    top = tl.maximum(tl.max(seen, 0), own_logit)
    if sinks is not None:
        sink = tl.load(sinks + row % HEADS)
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(seen - top), 0) + tl.exp(own_logit - top)
    if sinks is not None:
        total += tl.exp(sink - top)
    share = 1 / tl.where(total > 0, total, 1.0)

    blocks = tl.cdiv(width, BLOCK)
    if job < blocks:
        column = job * BLOCK + tl.arange(0, BLOCK)
        slot = column < width - 1
        logit = tl.load(probs + row * width + column, mask=slot, other=float("-inf"))
        logit = tl.where(slot, logit, own_logit)
        tl.store(probs + row * width + column, tl.exp(logit - top) * share, mask=column < width)
    else:
        segment = job - blocks
        first = 0
        last = 0
        for s in tl.static_range(len(slots)):
            here = tl.cdiv(slots[s], chunk)
            first += tl.where(s < segment, here, 0)
            last += tl.where(s <= segment, here, 0)
        element = tl.arange(0, V_COLUMNS)
        out = tl.zeros([V_COLUMNS], tl.float32)
        for start in range(first, last, STEP):
            at = start + tl.arange(0, STEP)
            part_lse = tl.load(lse + row * splits + at, mask=at < last, other=float("-inf"))
            part = tl.load(
                parts + (row * splits + at)[:, None] * V_DIM + element[None, :],
                mask=(at < last)[:, None] & (element < V_DIM)[None, :], other=0.0,
            )  # fmt: skip
            out += tl.sum(tl.exp(part_lse - top)[:, None] * part, 0)
        rows = tl.num_programs(0)
        tl.store(outs + (segment * rows + row) * V_DIM + element, out * share, mask=element < V_DIM)
