"""The two kernels' launch as one operator that traces, and the sizes of its grid and blocks.

An opaque operator, not ``torch.library.triton_op``: torch.compile of a triton_op fails under the
interpreter, so nothing could be tested without a GPU, and Triton's nested tuples are no argument
of it. Little is lost: all that could fuse with the kernels is of the size of the query and stays
outside, and CUDA graphs capture them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arkv_fx.plan import LayerPlan

PROBS_BLOCK = 1024  # columns of one program of ``combine``
PARTS_STEP = 16  # splits that one of its programs sums at once
MOST_SPLITS = 128


def block_slots(plan: LayerPlan) -> int:
    """Slots a program holds in registers at once: at most 8 KB of keys in the model's dtype.

    They are the inner dimension of the product with the values, which has a least.
    """
    from arkv_fx.kernels.gpu.tiles import least_inner

    row = max(plan.k_dim, plan.v_dim) * plan.dtype.itemsize
    size: int = max(least_inner(fmt.value.triton) for fmt, _ in plan.segments())
    while size < 128 and 2 * size * row <= 8192:
        size *= 2
    return size


def chunk_slots(slots: int, rows: int, processors: int, block: int) -> int:
    """Slots per program, in whole blocks: about four programs for each processor of the GPU.

    Args:
        slots: of one kv head; rows: batch times kv heads.
    """
    splits = min(max(1, 4 * processors // rows), MOST_SPLITS)
    return max(1, -(-slots // (splits * block))) * block


def constants(plan: LayerPlan, groups: int, softcap: float, bias_groups: int) -> dict[str, Any]:
    """The compile-time arguments of ``decode``: formats and dims, but no length and no batch."""
    import triton.language as tl
    from triton.runtime import JITFunction

    from arkv_fx.kernels.gpu.decode import decode

    narrow = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {
        "HEADS": plan.heads,
        "GROUPS": groups,
        "ROWS": max(16, 1 << (groups - 1).bit_length()),
        "K_DIM": plan.k_dim,
        "V_DIM": plan.v_dim,
        "K_CODECS": tuple(f.key.triton for f, _ in plan.segments()),
        "V_CODECS": tuple(f.value.triton for f, _ in plan.segments()),
        "SOFTCAP": softcap,
        "BIAS_GROUPS": bias_groups,
        "MODEL": narrow.get(plan.dtype, tl.float32),
        "ROUND_ONLY": not isinstance(decode, JITFunction),
        "BLOCK": block_slots(plan),
    }


def options(settings: dict[str, Any]) -> dict[str, Any]:
    """How ``decode`` is compiled, given its ``constants``.

    One stage: the loop waits for memory once per block, and four programs of 128 threads on a
    processor hide that; they fit if a thread takes at most 128 registers. Tiles of 16 query rows
    of up to 128 16-bit elements do; larger ones would spill and run fewer programs instead
    (float32 heads of 256 spill a little even so).
    """
    narrow = settings["MODEL"].primitive_bitwidth == 16
    dim = max(settings["K_DIM"], settings["V_DIM"])
    small = narrow and settings["ROWS"] == 16 and dim <= 128
    return {"num_warps": 4, "num_stages": 1, "maxnreg": 128 if small else None}


@torch.library.custom_op("arkv::attend_slots", mutates_args=())
def attend_slots(
    queries: Sequence[Tensor], fields: Sequence[Tensor], lowest: Tensor, bias: Tensor | None,
    centre: Tensor | None, own: Tensor, sinks: Tensor | None, plan: str, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of one query per head to all slots; softmax over slots, new token and sink.

    Args:
        queries: per segment [B, Hkv, G, Dk] float32, in the basis of its keys.
        fields: per segment its key fields, value fields and pos, all in one list.
        lowest: [B] int32; bias: [B, Hkv, G or 1, N] float32; see ``columns``.
        centre: [B, Hkv, G] float32, what the logits of centred keys lack.
        own: [B, Hkv, G] float32, the new token's finished logit.
        sinks: [Hq] float32.

    Returns:
        [segments, B, Hkv, G, Dv], each segment's sum of probability times stored value, and the
        probabilities [B, Hkv, G, N], both float32.
    """
    from arkv_fx.kernels.gpu.combine import combine
    from arkv_fx.kernels.gpu.decode import decode

    layer = LayerPlan.parse(plan)
    batch, heads, groups = own.shape
    bias = bias.contiguous() if bias is not None else None
    rest = iter([f.contiguous() for f in fields])
    segments = []
    for index, (fmt, _) in enumerate(layer.segments()):
        k = tuple(next(rest) for _ in fmt.key.fields(layer.k_dim, layer.dtype))
        v = tuple(next(rest) for _ in fmt.value.fields(layer.v_dim, layer.dtype))
        lacks = centre if index and fmt.key.centred else None
        segments.append((queries[index].contiguous(), lacks, k, v, next(rest)))
    slots = tuple(count for _, count in layer.segments())
    settings = constants(layer, groups, softcap, bias.shape[2] if bias is not None else 0)
    processors = _processors(own.device)
    chunk = chunk_slots(sum(slots), batch * heads, processors, settings["BLOCK"])
    splits = sum(-(-count // chunk) for count in slots)
    outs, probs = _empty(own, layer)
    parts = own.new_empty(batch, heads, groups, splits, layer.v_dim)
    lse = own.new_empty(batch, heads, groups, splits)
    width = probs.shape[-1]
    with torch.cuda.device_of(own):
        decode[batch * heads, splits](
            tuple(segments), slots, lowest.contiguous(), bias, probs, parts, lse, scale, chunk,
            splits, **settings, **options(settings),
        )  # fmt: skip
        combine[batch * heads * groups, -(-width // PROBS_BLOCK) + len(slots)](
            probs, parts, lse, own.contiguous(), sinks, outs, slots, chunk, splits, width,
            HEADS=heads * groups, V_DIM=layer.v_dim, V_COLUMNS=_power_of_two(layer.v_dim),
            SPLITS=_power_of_two(splits), BLOCK=PROBS_BLOCK, STEP=PARTS_STEP,
        )  # fmt: skip
    return outs, probs


@attend_slots.register_fake
def _(
    queries: Sequence[Tensor], fields: Sequence[Tensor], lowest: Tensor, bias: Tensor | None,
    centre: Tensor | None, own: Tensor, sinks: Tensor | None, plan: str, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(own, LayerPlan.parse(plan))


def _empty(own: Tensor, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    outs = own.new_empty(len(plan.tiers) + 1, *own.shape, plan.v_dim)
    return outs, own.new_empty(*own.shape, plan.slots + 1)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs one program after the other
    return torch.cuda.get_device_properties(device).multi_processor_count
