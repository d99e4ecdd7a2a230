"""Decode attention on a CPU in C++: codes are read as they are stored and never written out.

It is one operator, ``arkv_cpu::attend``, which Inductor takes as an external call. Its kernel is
compiled at first use, see ``build``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arkv_fx.errors import KernelError
from arkv_fx.ops.attention import Knobs, allowed
from arkv_fx.ops.kernels.cpp.build import available, load
from arkv_fx.state.view import Segment, View

__all__ = ["attend_cpp", "available"]

DTYPES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "float16"}
CODECS = ("float32", "bf16", "float16", "fp8", "int8", "int4", "int3")  # as codecs.h counts them


def attend_cpp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: View, knobs: Knobs,
    query_pos: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``Kernel``.

    Codes of half-precision models are multiplied as integers, the query and the weights in 16 bits
    of their largest, which is some 20 times finer than such a model's own numbers.

    Raises:
        KernelError: for tensors elsewhere than on a CPU or of another dtype; without a compiler.
    """
    if q.device.type != "cpu" or q.dtype not in DTYPES:
        raise KernelError(
            f"the C++ kernel takes float32, bfloat16 and float16 on a CPU, not {q.dtype} on "
            f"{q.device.type}; choose the kernel 'reference'"
        )
    bias = None
    if mask is not None:
        added = 0.0 if mask.dtype == torch.bool else mask.float()
        bias = torch.where(allowed(mask), added, float("-inf")).contiguous()
    sink = None if knobs.sink_logits is None else knobs.sink_logits.float().contiguous()
    slots = [t for s in held.segments for t in (*s.k, *s.v, s.pos.contiguous())]
    codecs = [n for s in held.segments for n in _codecs(s, DTYPES[q.dtype])]
    out, probs = torch.ops.arkv_cpu.attend(
        q.contiguous(), k.contiguous(), v.contiguous(), query_pos.contiguous(), bias, sink,
        held.centre, slots, codecs, knobs.scale, knobs.softcap, held.plan.sliding,
    )  # fmt: skip
    return out, probs


def _codecs(segment: Segment, native: str) -> tuple[int, int, int]:
    """Numbers of the keys' and the values' codec, and 1 if the keys are centred."""
    names = (segment.format.key.name, segment.format.value.name)
    key, value = (CODECS.index(native if n == "native" else n) for n in names)
    return key, value, int(segment.centre is not None)


_library = torch.library.Library("arkv_cpu", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor position, Tensor? bias, Tensor? sink, "
    "Tensor? centre, Tensor[] slots, int[] codecs, float scale, float softcap, int sliding) "
    "-> (Tensor, Tensor)"
)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, bias: Tensor | None, sink: Tensor | None,
    centre: Tensor | None, slots: Sequence[Tensor], codecs: Sequence[int], scale: float,
    softcap: float, sliding: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What runs until the library is there: it loads it, and its kernel for CPUs takes over.

    All tensors are contiguous.

    Args:
        q: [B, H, G, 1, Dk], k: [B, H, 1, Dk], v: [B, H, 1, Dv], in the model's dtype.
        position: [B, 1] int32, of the new token.
        bias: [B or 1, H * G or 1, 1, S] float32, added by position, its last column the newest's.
        sink: [H * G] float32; centre: [B, H, Dk] float32.
        slots: per segment, the fields of the keys and of the values, and pos.
        codecs: per segment, see ``_codecs``.
    """
    load()
    out, probs = torch.ops.arkv_cpu.attend(
        q, k, v, position, bias, sink, centre, slots, codecs, scale, softcap, sliding
    )
    return out, probs


def _fake(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, bias: Tensor | None, sink: Tensor | None,
    centre: Tensor | None, slots: Sequence[Tensor], codecs: Sequence[int], scale: float,
    softcap: float, sliding: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    columns = 1 + sum(t.shape[2] for t in slots if t.dim() == 3)  # of all fields only pos is 3-D
    return (
        q.new_empty((*q.shape[:4], v.shape[3]), dtype=torch.float32),
        q.new_empty((*q.shape[:4], columns), dtype=torch.float32),
    )


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("arkv_cpu::attend", _fake, lib=_library)
