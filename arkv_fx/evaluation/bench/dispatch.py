"""``dispatch``: what a layer's compiled decode step costs where there is nothing to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from arkv_fx.evaluation.bench.cases import Case, Options, filled, new_token
from arkv_fx.evaluation.bench.contest import Entrant, compete
from arkv_fx.evaluation.bench.layer import as_graphs_call_it, plain_step
from arkv_fx.evaluation.bench.measurements import Measurement, dtype_name
from arkv_fx.kernels import usable
from arkv_fx.plan import LayerPlan

LAYERS = 4
SMALLEST = Case("smallest", 1, 1, 16)
SLOTS = 44
"""Window, sinks and eight slots more: kernels of a microsecond or so, so the rest is dispatch."""


def dispatch(options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    """Per layer and kernel: one step, and several in a row.

    The time inside the kernels is that of a few slots; it is not taken off.
    """
    plan = replace(options, slots=SLOTS).plan(SMALLEST)
    token = new_token(SMALLEST, options)
    states = [filled(plan, 1, 2 * SLOTS, options.batch, options.device) for _ in range(LAYERS)]
    tensors = [state.tensors for state in states]
    entrants = []
    for kernel in usable(options.device):
        for layers, how in ((1, "alone"), (LAYERS, "in one graph")):
            row = Measurement(
                "dispatch", SMALLEST.name, f"arkv-{kernel}, {how}", dtype_name(options.dtype),
                plan.slots, bytes=plan.nbytes(options.batch),
            )  # fmt: skip
            run = as_graphs_call_it(_steps(plan, kernel), plan, kernel, options)
            entrants.append(Entrant(row, _on(run, token, tensors[:layers])))
    rows = compete(entrants, options, progress)
    return [row if index % 2 == 0 else _per_layer(row, LAYERS) for index, row in enumerate(rows)]


def _steps(plan: LayerPlan, kernel: str) -> Callable[..., Any]:
    """One decode step for each of several layers, each of which gets the output of the last."""
    step = plain_step(SMALLEST, plan, kernel)

    def run(q: Tensor, k: Tensor, v: Tensor, states: list[list[Tensor]]) -> Tensor:
        for state in states:
            q = step(q, k, v, state)
        return q

    return run


def _on(
    run: Callable[..., Any], token: tuple[Tensor, Tensor, Tensor], states: list[list[Tensor]]
) -> Callable[[], Any]:
    return lambda: run(*token, states)


def _per_layer(row: Measurement, layers: int) -> Measurement:
    """A time of several layers divided by their number."""
    spans = {n: getattr(row, n) for n in ("median_us", "low_us", "high_us")}
    return replace(row, **{n: t / layers for n, t in spans.items() if t is not None})
