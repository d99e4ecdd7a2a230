"""``update``: what keeping the state costs on top of the attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from arkv_fx.evaluation.bench.cases import Case, Options, new_token
from arkv_fx.evaluation.bench.contest import Entrant, compete
from arkv_fx.evaluation.bench.layer import attention_step, cold_states, on_states, whole_step
from arkv_fx.evaluation.bench.measurements import Measurement, dtype_name
from arkv_fx.kernels import usable


def update(options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    """Per kernel the attention alone, the whole step, and the difference of their medians."""
    return [row for case in options.cases for row in _case(case, options, progress)]


def _case(case: Case, options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    plan = options.plan(case)
    token, states = new_token(case, options), cold_states(case, plan, options)
    empty = Measurement(
        "update", case.name, "", dtype_name(options.dtype), plan.slots,
        bytes=plan.nbytes(options.batch),
    )  # fmt: skip
    entrants = []
    for kernel in usable(options.device):
        parts = {
            "attention": attention_step(case, plan, kernel, options, states),
            "step": whole_step(case, plan, kernel, options, states),
        }
        for part, step in parts.items():
            row = replace(empty, method=f"arkv-{kernel} {part}")
            entrants.append(Entrant(row, on_states(step, token, states)))
    rows = compete(entrants, options, progress)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [row for alone, whole in pairs for row in _with_difference(alone, whole)]


def _with_difference(alone: Measurement, whole: Measurement) -> Sequence[Measurement]:
    if alone.median_us is None or whole.median_us is None:
        return alone, whole
    rest = whole.median_us - alone.median_us
    update = replace(
        alone,
        method=alone.method.replace(" attention", " update"),
        median_us=rest,
        low_us=None,
        high_us=None,
        note=f"{rest / whole.median_us:.1%} of the step",
    )
    return alone, whole.against([alone]), update
