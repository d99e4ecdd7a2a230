"""The decode step past torch's dispatcher, for graphs that run.

On a cold cache, as between the layers of a model, to dispatch an operator of thirty tensors takes
longer than the step itself.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from arkv_fx.errors import KernelError
from arkv_fx.kernels.cpp.arguments import DTYPES, NUMBERS
from arkv_fx.kernels.cpp.build import load
from arkv_fx.kernels.cpp.step_operator import constants_of, make_step
from arkv_fx.kernels.kernel import Step
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan

address = Tensor.data_ptr
# As Inductor's code makes its buffers: on a cold cache the dispatcher costs a tenth of the step.
empty = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]


def make_direct_step(plan: LayerPlan) -> Step | None:
    """As ``make_step``, for real tensors outside of any tracing; make one for each layer.

    Where the state's tensors lie is read in every call; if it is not where they lay in the last
    one, they are looked at closely. What is rare (masks, sinks, strided tensors) is left to the
    operator, and so is what it refuses.

    The step raises ``KernelError`` for tensors of other shapes or dtypes than the plan's.
    """
    constants, operator = constants_of(plan), make_step(plan)
    if constants is None or operator is None:
        return None
    dtype, heads, v_dim = plan.dtype, plan.heads, plan.v_dim
    sizes = [heads, plan.k_dim, v_dim, NUMBERS.index(DTYPES[dtype]), len(constants.codecs)]
    numbers = [array("q", part).tobytes() for part in (sizes, *constants[:2])]
    numbers.append(array("d", constants.weights).tobytes())
    fields = len(plan.specs())
    pack = struct.Struct(f"{fields}q").pack
    run = load().arkv_step
    run.argtypes = [
        *[c_char_p] * 4, *[c_int64] * 2, *[c_double] * 2, *[c_void_p] * 3, c_char_p, c_void_p
    ]  # fmt: skip
    run.restype = None
    known: tuple[bytes, ...] | bytes = b""
    shapes: tuple[torch.Size, ...] = ()

    def step(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Sequence[Tensor], knobs: Knobs
    ) -> Tensor:
        nonlocal known, shapes
        if mask is not None or knobs.sink_logits is not None:
            return operator(q, k, v, mask, state, knobs)
        for x in (q, k, v):
            if x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
                return operator(q, k, v, mask, state, knobs)
        where = pack(*map(address, state)) if len(state) == fields else b""
        now = (q.shape, k.shape, v.shape, state[0].shape)
        if where != known or now != shapes:
            _check(q, k, v, state, plan)
            known, shapes = where, now
        batch, all_heads = now[0][:2]
        size = (batch, all_heads, 1, v_dim)
        out: Tensor = empty(size, (all_heads * v_dim, v_dim, v_dim, 1), dtype)
        run(
            *numbers, batch, all_heads // heads, knobs.scale, knobs.softcap,
            address(q), address(k), address(v), where, address(out),
        )  # fmt: skip
        return out

    return step


def _check(q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor], plan: LayerPlan) -> None:
    """Raise ``KernelError`` unless all tensors are as the plan has them."""
    batch = len(k)
    expected = [((batch, *s.shape), s.dtype) for s in plan.specs()]
    found = [(tuple(t.shape), t.dtype) for t in state]
    plain = all(t.is_cpu and t.is_contiguous() for t in state)
    one = [(batch, plan.heads, 1, dim) for dim in (plan.k_dim, plan.v_dim)]
    queries = (batch, q.shape[1] // plan.heads * plan.heads, 1, plan.k_dim)
    if (q.shape, k.shape, v.shape) != (queries, *one) or found != expected or not plain:
        raise KernelError(
            f"the C++ step got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and a "
            f"state that are not those of its plan: k {one[0]}, v {one[1]} and the contiguous "
            "tensors of LayerPlan.specs(), each with the batch before; "
            "pass LayerState.tensors of this plan"
        )
