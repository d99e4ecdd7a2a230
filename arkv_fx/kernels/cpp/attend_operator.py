"""``arkv_cpu::attend``: the attention of one token, with its probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arkv_fx.errors import KernelError
from arkv_fx.kernels.cpp.arguments import check, codecs, library, readable, sink
from arkv_fx.kernels.cpp.build import load
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.state.view import View


def attend_cpp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: View, knobs: Knobs,
    query_pos: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``Attend``.

    Codes of half-precision models are multiplied as integers, the query and the weights in 16 bits
    of their largest, which is some 20 times finer than such a model's own numbers.

    Raises:
        KernelError: for tensors elsewhere than on a CPU or of another dtype; for formats of others;
            without a compiler.
    """
    check(q, held.plan)
    numbers = codecs(held.plan)
    if numbers is None:
        raise KernelError("the C++ kernel knows only the formats of arkv_fx; choose 'reference'")
    fields = [t for s in held.segments for t in (*s.k, *s.v)]
    out, probs = torch.ops.arkv_cpu.attend(
        q.flatten(1, 2).contiguous(), k.contiguous(), v.contiguous(), query_pos.contiguous(),
        readable(mask), sink(knobs), held.centre, held.pos, fields, numbers, knobs.scale,
        knobs.softcap, held.plan.sliding,
    )  # fmt: skip
    return out, probs


library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor position, Tensor? mask, Tensor? sink, "
    "Tensor? centre, Tensor pos, Tensor[] fields, int[] codecs, float scale, float softcap, "
    "int sliding) -> (Tensor, Tensor)"
)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, mask: Tensor | None, sink: Tensor | None,
    centre: Tensor | None, pos: Tensor, fields: Sequence[Tensor], codecs: Sequence[int],
    scale: float, softcap: float, sliding: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What runs until the library is there: it loads it, and its kernel for CPUs takes over.

    All tensors but the mask are contiguous.

    Args:
        q: [B, H * G, 1, Dk], k: [B, H, 1, Dk], v: [B, H, 1, Dv], in the model's dtype.
        position: [B, 1] int32, of the new token.
        mask: as in ``Attend``, bool or in one of ``DTYPES``.
        sink: [H * G] float32; centre: [B, H, Dk] float32; pos: [B, H, N] int32 or
            int16.
        fields: per segment, the fields of the keys and of the values.
        codecs: per segment, see ``arguments.codecs``.
    """
    load()
    out, probs = torch.ops.arkv_cpu.attend(
        q, k, v, position, mask, sink, centre, pos, fields, codecs, scale, softcap, sliding
    )
    return out, probs


def _fake(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, mask: Tensor | None, sink: Tensor | None,
    centre: Tensor | None, pos: Tensor, fields: Sequence[Tensor], codecs: Sequence[int],
    scale: float, softcap: float, sliding: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (*k.shape[:2], q.shape[1] // k.shape[1], 1)
    return (
        q.new_empty((*shape, v.shape[3]), dtype=torch.float32),
        q.new_empty((*shape, pos.shape[2] + 1), dtype=torch.float32),
    )


library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("arkv_cpu::attend", _fake, lib=library)
