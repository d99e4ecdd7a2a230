"""What the operators take: the library they belong to, codecs by number, tensors made plain."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from arkv_fx.errors import KernelError
from arkv_fx.formats import CODECS, Codec
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan
from arkv_fx.registry import forgets

library = torch.library.Library("arkv_cpu", "FRAGMENT")

DTYPES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "float16"}
FORMS = {codec.name: codec.cpp for codec in CODECS.values() if codec.cpp is not None}
NUMBERS = (*DTYPES.values(), *FORMS)
"""Codecs as the library counts them: numbers of three dtypes, then those that have a form."""


def number(codec: Codec, native: torch.dtype) -> int | None:
    """A codec's index in ``NUMBERS``, for vectors in dtype ``native``; None: it is not known."""
    if native not in DTYPES:
        return None
    if codec.plain:
        held = codec.fields(codec.multiple, native)
        known = len(held) == 1 and held[0].width == codec.multiple and held[0].dtype in DTYPES
        return NUMBERS.index(DTYPES[held[0].dtype]) if known else None
    known = codec.cpp is not None and FORMS.get(codec.name) == codec.cpp
    return NUMBERS.index(codec.name) if known else None


def lacks(plan: LayerPlan) -> list[str]:
    """Names of a plan's codecs, and of a dtype, that the library does not know."""
    if plan.dtype not in DTYPES:
        return [str(plan.dtype)]
    codecs = (c for f, _ in plan.segments() for c in f.codecs)
    return sorted({c.name for c in codecs if number(c, plan.dtype) is None})


@forgets
@lru_cache(maxsize=256)
def codecs(plan: LayerPlan) -> list[int] | None:
    """Per segment, the numbers of the keys' and the values' codec, 1 if keys are centred, slots.

    None if there is a codec or a dtype that the library does not know.
    """
    out: list[int] = []
    for index, (fmt, slots) in enumerate(plan.segments()):
        for codec in fmt.codecs:
            found = number(codec, plan.dtype)
            if found is None:
                return None
            out.append(found)
        out += [int(index > 0 and fmt.key.centred), slots]
    return out


def check(q: Tensor, plan: LayerPlan) -> None:
    """Raise ``KernelError`` for what the library cannot take."""
    if q.device.type != "cpu" or q.dtype not in DTYPES or q.dtype != plan.dtype:
        raise KernelError(
            f"the C++ kernel takes float32, bfloat16 and float16 on a CPU, in the dtype of the "
            f"cache ({plan.dtype}), not {q.dtype} on {q.device.type}; choose the kernel 'reference'"
        )


def readable(mask: Tensor | None) -> Tensor | None:
    """A mask in one of the dtypes that the library reads, its strides as they are."""
    if mask is None or mask.dtype in DTYPES or mask.dtype == torch.bool:
        return mask
    return mask.float()


def sink(knobs: Knobs) -> Tensor | None:
    """The sinks' logits [Hq] in float32."""
    return None if knobs.sink_logits is None else knobs.sink_logits.detach().float().contiguous()
