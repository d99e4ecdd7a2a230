"""Which of our products takes a linear layer's place: by its dtype and how its weight is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from arkv_fx.kernels.cpp import linear_int4_operator, linear_int8_operator
from arkv_fx.kernels.cpp.arguments import DTYPES
from arkv_fx.kernels.cpp.linear_operator import few_rows, multiplied_by_torch
from arkv_fx.weights.stored import stored, tensors_of

OPS = torch.ops.arkv_cpu


@dataclass(frozen=True)
class Form:
    """How layers of one kind are multiplied; those of equal forms may be one call.

    Args:
        few: the operator for up to ``rows`` rows, over lists of weights.
        many: that for one weight and more rows; None: they are left to whoever multiplied before.
        parts: the attributes of the weight that both take; None: there is none. No parts: itself.
        rest: what both take at the end.
        groups: scales of a row, of which calls have one number.
    """

    few: Any
    rows: int
    many: Any
    parts: tuple[str | None, ...] = ()
    rest: tuple[Any, ...] = ()
    groups: int = 1


def form_of(x: Any, weight: Any, bias: Any, out: Any) -> Form | None:
    """The form of a layer by examples of its tensors (``bias`` may be None); None: it stays.

    Everything must be on a CPU, in one dtype that the library knows (what comes out, too: under an
    autocast within the graph it is not), and weights and what they are made of contiguous.
    """
    tensors = [t for t in (x, weight, bias, out) if t is not None]
    if not all(isinstance(t, Tensor) and t.device.type == "cpu" for t in tensors):
        return None
    if len({t.dtype for t in tensors}) > 1 or x.dtype not in DTYPES:
        return None
    if any(is_traceable_wrapper_subclass(t) for t in (x, bias)):
        return None
    held = stored(weight)
    plain = [weight] if held is None else tensors_of(weight, held)
    if any(map(is_traceable_wrapper_subclass, plain)):
        return None
    if not all(t.is_contiguous() and t.device.type == "cpu" for t in (*plain, *tensors[2:-1])):
        return None
    few, slow = few_rows(x.dtype), not multiplied_by_torch(x.dtype)
    if held is None:
        many = OPS.linear_in_float32.default if slow else None
        return Form(OPS.linear.default, few, many)
    if held.kind == "int8":
        many = OPS.linear_int8_in_float32.default if slow else None
        rows = linear_int8_operator.FEW
        return Form(OPS.linear_int8.default, rows, many, held.parts, (), held.groups)
    lies = linear_int4_operator.layout()
    if lies is None:
        return None
    many, rows = OPS.linear_int4_many.default, linear_int4_operator.FEW
    return Form(OPS.linear_int4.default, rows, many, held.parts, lies, held.groups)
