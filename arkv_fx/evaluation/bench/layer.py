"""One layer's decode step, as graphs run it: attention alone, and with the update of the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx.compile.pieces import SETTINGS
from arkv_fx.evaluation.bench.cases import Case, Options, filled, new_token
from arkv_fx.evaluation.bench.timing import Call, Rotation, cold_bytes, compiled
from arkv_fx.kernels import KERNELS, get_direct_step, get_kernel
from arkv_fx.kernels.softmax import Knobs, group
from arkv_fx.plan import LayerPlan
from arkv_fx.state.session import LayerState
from arkv_fx.state.view import View, view

Step = Callable[[Tensor, Tensor, Tensor, list[Tensor]], Any]
"""Of q [B, Hq, 1, D], k and v [B, Hkv, 1, D] and the state's tensors."""


def attention_step(
    case: Case, plan: LayerPlan, kernel: str, options: Options, states: Rotation[LayerState]
) -> Step:
    """The kernel alone on one of ``states``: output and probabilities; the state stays."""

    def on_view(q: Tensor, k: Tensor, v: Tensor, held: View) -> tuple[Tensor, Tensor]:
        pos = held.seen[:, None]
        out, probs = get_kernel(kernel)(
            group(q, plan.heads), k, v, None, held, Knobs(case.scale), pos
        )
        return out.to(q.dtype), probs

    def run(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor]) -> tuple[Tensor, Tensor]:
        return on_view(q, k, v, view(plan, state))

    if KERNELS[kernel].step is None:
        return compiled(run, options.backend, SETTINGS, dynamic=False)
    # One operator: compiling adds nothing. Naming a state's tensors would cost as much as it does,
    # and is done once for each.
    views = {id(copy.tensors): copy.view() for copy in states.copies}
    return lambda q, k, v, state: on_view(q, k, v, views[id(state)])


def plain_step(case: Case, plan: LayerPlan, kernel: str) -> Step:
    """``arkv::attend``: the same and the update of scores, ring and tiers; not compiled."""
    knobs = Knobs(case.scale)
    if get_direct_step(kernel, plan) is not None:
        # Graphs make one for each layer; a state stands for a layer here.
        steps: dict[int, Any] = {}

        def direct(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor]) -> Any:
            if id(state) not in steps:
                steps[id(state)] = get_direct_step(kernel, plan)
            return steps[id(state)](q, k, v, None, state, knobs)

        return direct
    text, scale = plan.to_json(), case.scale

    def run(q: Tensor, k: Tensor, v: Tensor, state: list[Tensor]) -> Any:
        return torch.ops.arkv.attend(
            q, k, v, None, state, text, scale, 0.0, None, False, kernel=kernel
        )

    return run


def as_graphs_call_it(
    run: Callable[..., Any], plan: LayerPlan, kernel: str, options: Options
) -> Callable[..., Any]:
    """``run``, made of ``plain_step``, compiled unless the kernel has whole steps."""
    if get_direct_step(kernel, plan) is not None:
        return run
    return compiled(run, options.backend, SETTINGS, dynamic=False)


def whole_step(
    case: Case, plan: LayerPlan, kernel: str, options: Options, states: Rotation[LayerState]
) -> Step:
    """``plain_step`` as graphs call it; each of ``states`` has had its first token."""
    step = as_graphs_call_it(plain_step(case, plan, kernel), plan, kernel, options)
    if get_direct_step(kernel, plan) is not None:
        for copy in states.copies:
            step(*new_token(case, options), copy.tensors)
    return step


def cold_states(case: Case, plan: LayerPlan, options: Options) -> Rotation[LayerState]:
    """Copies of a state whose slots are all taken."""
    groups, device = case.q_heads // case.heads, options.device
    first = filled(plan, groups, 2 * plan.slots, options.batch, device)
    return Rotation(first.clone, plan.nbytes(options.batch), cold_bytes(device))


def on_states(
    step: Step, token: tuple[Tensor, Tensor, Tensor], states: Rotation[LayerState]
) -> Call:
    """The step of one token, each time on the next copy of the state."""
    return lambda: step(*token, states().tensors)
