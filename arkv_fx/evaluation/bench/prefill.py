"""``prefill``: a prompt's attention with the filling of the state, and plain causal attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx.compile.pieces import SETTINGS
from arkv_fx.evaluation.bench.baselines import causal
from arkv_fx.evaluation.bench.cases import Case, Options
from arkv_fx.evaluation.bench.contest import Entrant, compete
from arkv_fx.evaluation.bench.measurements import Measurement, dtype_name
from arkv_fx.evaluation.bench.timing import compiled
from arkv_fx.kernels import usable
from arkv_fx.state.session import LayerState


def prefill(options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    """One layer: as compiled graphs run a prompt's attention, with the reference, and compiled."""
    return [row for case in options.cases for row in _case(case, options, progress)]


def _case(case: Case, options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    plan, tokens = options.plan(case), options.prompt
    best = usable(options.device)[0]
    text, dtype = plan.to_json(), dtype_name(options.dtype)
    q = options.random(case.q_heads, tokens, case.dim)
    k, v = (options.random(case.heads, tokens, case.dim) for _ in range(2))

    def attend(state: list[torch.Tensor], kernel: str = "reference") -> Any:
        return torch.ops.arkv.attend(
            q, k, v, None, state, text, case.scale, 0.0, None, True, kernel=kernel
        )

    def ours(name: str, run: Callable[..., Any]) -> Entrant:
        def call() -> Any:  # a prompt comes with an empty cache: making it is part of it
            return run(LayerState(plan, options.batch, options.device).tensors)

        held = plan.nbytes(options.batch)
        return Entrant(
            Measurement("prefill", case.name, name, dtype, plan.slots, tokens, bytes=held), call
        )

    full = plan.full_nbytes(tokens, options.batch)
    row = Measurement("prefill", case.name, "sdpa-causal", dtype, context=tokens, bytes=full)
    entrants = [
        ours(f"arkv-{best}", partial(attend, kernel=best)),
        ours("arkv-eager", attend),
        ours("arkv-compiled", compiled(attend, options.backend, SETTINGS, dynamic=False)),
        Entrant(row, partial(causal, q, k, v)),
    ]
    # A prompt takes as long as hundreds of decode steps, and varies less.
    *rows, baseline = compete(entrants, options, progress, max(3, options.rounds // 4))
    return [*(row.against([baseline]) for row in rows), baseline]
