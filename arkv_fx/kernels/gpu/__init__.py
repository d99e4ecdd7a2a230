"""Decode attention on CUDA: split over the slots, codes read as they are stored.

One launch over ring and tiers, each with its own formats, and one that combines the splits; what
is of the size of the query or of the mask is plain torch around them.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from arkv_fx.errors import KernelError
from arkv_fx.kernels.columns import (
    centre_logits,
    column_bias,
    join_bases,
    lowest,
    stored_query,
)
from arkv_fx.kernels.gpu.launch import attend_slots
from arkv_fx.kernels.kernel import Kernel
from arkv_fx.kernels.softmax import Knobs, cap
from arkv_fx.plan import LayerPlan
from arkv_fx.state.view import View

__all__ = ["FORMS", "KERNEL", "attend_triton"]

FORMS = frozenset({"native", "bf16", "fp8", "int8", "int4", "int3"})
"""What ``tiles.py`` reads, by the names that codecs give in ``Codec.triton``."""


def attend_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, held: View, knobs: Knobs,
    query_pos: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``Attend``; T is 1.

    Raises:
        KernelError: without Triton, or off the GPU and not in Triton's interpreter.
    """
    _check(q)
    own = cap((q.squeeze(3).float() * k.float()).sum(-1) * knobs.scale, knobs)
    bias = column_bias(mask, held, q.shape[2])
    if bias is not None:
        own = own + bias[..., -1]
    centred = [s for s in held.segments if s.centre is not None]
    outs, probs = attend_slots(
        [stored_query(q, s) for s in held.segments],
        [t for s in held.segments for t in (*s.k, *s.v, s.pos.contiguous())],
        lowest(held, query_pos),
        bias,
        centre_logits(q, centred[0]) if centred else None,
        own,
        knobs.sink_logits.float() if knobs.sink_logits is not None else None,
        held.plan.to_json(),
        knobs.scale,
        knobs.softcap,
    )
    return join_bases(list(outs.unbind(0)), held, probs[..., -1:] * v.float()), probs[:, :, :, None]


def _check(q: Tensor) -> None:
    if importlib.util.find_spec("triton") is None:
        raise KernelError(
            "kernel 'triton': Triton is not installed (pip install triton); kernel 'reference' "
            "needs nothing"
        )
    from triton import knobs

    if q.device.type != "cuda" and not knobs.runtime.interpret:
        raise KernelError(
            f"kernel 'triton' runs on CUDA devices and the tensors are on {q.device.type!r}; use "
            "kernel 'reference', or set TRITON_INTERPRET=1 before Triton is imported, to debug"
        )


def _obstacle(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "" if device.type == "cuda" else "it runs on CUDA devices"


def _lacks(plan: LayerPlan) -> list[str]:
    return sorted({c.name for f, _ in plan.segments() for c in f.codecs if c.triton not in FORMS})


KERNEL = Kernel("triton", attend_triton, priority=20, obstacle=_obstacle, lacks=_lacks)
