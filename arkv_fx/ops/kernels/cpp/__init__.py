"""Decode attention on a CPU in C++: codes are read as they are stored and never written out.

The source is compiled at first use by Inductor's machinery, which finds the compiler, chooses the
instruction set and keeps the result on disk. It is called as one operator, ``arkv_cpu::attend``,
which Inductor takes as an external call.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int64
from functools import lru_cache

import torch
from torch import Tensor

from arkv_fx.ops.attention import Knobs, allowed
from arkv_fx.ops.kernels.cpp.build import available, load
from arkv_fx.state.view import View

__all__ = ["attend_cpp", "available"]

CODECS = ("float32", "bfloat16", "float16", "fp8", "int8", "int4", "int3")  # as codecs.h has them
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def attend_cpp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: View, knobs: Knobs,
    query_pos: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``Kernel``."""
    bias = None
    if mask is not None:
        added = 0.0 if mask.dtype == torch.bool else mask.float()
        bias = torch.where(allowed(mask), added, float("-inf"))
    slots = [t for s in held.segments for t in (*s.k, *s.v, s.pos)]
    sink = knobs.sink_logits.float() if knobs.sink_logits is not None else None
    formats = ",".join(
        f"{codec.name}{'*' if side == 0 and s.centre is not None else ''}"
        for s in held.segments
        for side, (codec, _) in enumerate(s.parts())
    )
    out, probs = torch.ops.arkv_cpu.attend(
        q, k, v, query_pos, bias, sink, held.centre, slots, formats,
        knobs.scale, knobs.softcap, held.plan.sliding,
    )  # fmt: skip
    return out, probs


_library = torch.library.Library("arkv_cpu", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor position, Tensor? bias, Tensor? sink, "
    "Tensor? centre, Tensor[] slots, str formats, float scale, float softcap, int sliding) "
    "-> (Tensor, Tensor)"
)


@lru_cache(maxsize=256)
def _parse(formats: str, native: str) -> tuple[tuple[int, int, int, int, int], ...]:
    """Per segment: number of the key's and the value's codec, of their fields, and centred or not.

    ``native`` is the model's dtype; a codec's fields are codes, scale, zero, as many as it has.
    """
    names = formats.split(",")
    own = {"native": native, "bf16": "bfloat16"}
    found = []
    for key, value in zip(names[::2], names[1::2], strict=True):
        pair = [CODECS.index(own.get(n, n)) for n in (key.rstrip("*"), value)]
        fields = [1 + (c >= 3) + (c >= 5) for c in pair]
        found.append((pair[0], pair[1], fields[0], fields[1], int(key.endswith("*"))))
    return tuple(found)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, bias: Tensor | None, sink: Tensor | None,
    centre: Tensor | None, slots: Sequence[Tensor], formats: str, scale: float, softcap: float,
    sliding: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One call into the library.

    Args:
        q: [B, H, G, 1, Dk], k: [B, H, 1, Dk], v: [B, H, 1, Dv], in the model's dtype.
        position: [B, 1] int32, of the new token.
        bias: [B or 1, H * G or 1, 1, S] float32, its last column the new token's.
        sink: [H * G] float32; centre: [B, H, Dk] float32.
        slots: per segment, the fields of the keys and of the values, and pos.
        formats: per segment the codecs' names, a star behind the key's where it is centred.
    """
    batch, heads, groups, _, k_dim = q.shape
    v_dim = v.shape[-1]
    number = DTYPES[q.dtype]
    q, k, v, position = q.contiguous(), k.contiguous(), v.contiguous(), position.contiguous()
    keep = [q, k, v, position]

    def pointer(t: Tensor | None) -> int:
        if t is None:
            return 0
        if not t.is_contiguous():
            t = t.contiguous()
            keep.append(t)
        return t.data_ptr()

    segments: list[int] = []
    columns, at = 1, 0
    for key, value, key_fields, value_fields, centred in _parse(formats, CODECS[number]):
        end = at + key_fields + value_fields
        pos = slots[end]
        count = pos.shape[2]
        columns += count
        segments += (key, value, count, centred, pointer(pos))
        for first, fields in ((at, key_fields), (at + key_fields, value_fields)):
            segments += [pointer(slots[first + i]) if i < fields else 0 for i in range(3)]
        at = end + 1
    segments += (number, number, 1, 0, 0, k.data_ptr(), 0, 0, v.data_ptr(), 0, 0)
    out = torch.empty((batch, heads, groups, 1, v_dim), dtype=torch.float32)
    probs = torch.empty((batch, heads, groups, 1, columns), dtype=torch.float32)
    strides = (0, 0, 0)
    if bias is not None:
        bias = bias.contiguous()
        keep.append(bias)
        length = bias.shape[3]
        strides = (
            bias.shape[1] * length if bias.shape[0] > 1 else 0,
            length if bias.shape[1] > 1 else 0,
            length,
        )
    call = [
        torch.get_num_threads(), batch, heads, groups, k_dim, v_dim, number, sliding,
        len(segments) // 11, q.data_ptr(), position.data_ptr(), pointer(bias), *strides,
        pointer(sink), pointer(centre), out.data_ptr(), probs.data_ptr(), *segments,
    ]  # fmt: skip
    load().arkv_attend((c_int64 * len(call))(*call), c_float(scale), c_float(softcap))
    return out, probs


def _fake(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, bias: Tensor | None, sink: Tensor | None,
    centre: Tensor | None, slots: Sequence[Tensor], formats: str, scale: float, softcap: float,
    sliding: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    columns, at = 1, 0
    for _, _, key_fields, value_fields, _ in _parse(formats, CODECS[DTYPES[q.dtype]]):
        at += key_fields + value_fields
        columns += slots[at].shape[2]
        at += 1
    shape = q.shape[:4]
    return (
        q.new_empty((*shape, v.shape[-1]), dtype=torch.float32),
        q.new_empty((*shape, columns), dtype=torch.float32),
    )


_library.impl("attend", _attend, "CPU")
torch.library.register_fake("arkv_cpu::attend", _fake, lib=_library)
