"""``attention``: a decode step over our slots, and over full caches by the known means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arkv_fx.evaluation.bench.baselines import Attention, decode_baselines, words
from arkv_fx.evaluation.bench.cases import Case, Options, new_token
from arkv_fx.evaluation.bench.contest import Entrant, compete
from arkv_fx.evaluation.bench.layer import attention_step, cold_states, on_states, whole_step
from arkv_fx.evaluation.bench.measurements import Measurement, dtype_name
from arkv_fx.evaluation.bench.timing import Call, Rotation, cold_bytes
from arkv_fx.kernels import get_direct_step, usable

CONTEXTS = (4096, 8192, 32768)


def attention(options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    """Every kernel, every baseline at every context and at the same slots, and the bound."""
    return [row for case in options.cases for row in _case(case, options, progress)]


def _case(case: Case, options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    plan, dtype = options.plan(case), dtype_name(options.dtype)
    held, cold = plan.nbytes(options.batch), cold_bytes(options.device)
    token = new_token(case, options)
    progress(f"{case.name}: states of {plan.slots} slots")
    states = cold_states(case, plan, options)

    def row(method: str, nbytes: int, **where: Any) -> Measurement:
        return Measurement("attention", case.name, method, dtype, bytes=nbytes, **where)

    entrants = []
    for kernel in usable(options.device):
        step = attention_step(case, plan, kernel, options, states)
        call = on_states(step, token, states)
        entrants.append(Entrant(row(f"arkv-{kernel}", held, slots=plan.slots), call))
        if get_direct_step(kernel, plan) is not None:
            call = on_states(whole_step(case, plan, kernel, options, states), token, states)
            entrants.append(Entrant(row(f"arkv-{kernel} step", held, slots=plan.slots), call))
    data = Rotation(lambda: words(held, options.device), held, cold)
    entrants.append(Entrant(row("bound", held, slots=plan.slots), lambda: data().sum()))
    for tokens in dict.fromkeys((*(options.contexts or CONTEXTS), plan.slots)):
        nbytes = plan.full_nbytes(tokens, options.batch)
        full = Rotation(_full_cache(case, tokens, options), nbytes, cold)
        for name, attend in decode_baselines(options).items():
            entrants.append(
                Entrant(row(name, nbytes, context=tokens), _over(attend, token[0], full))
            )
    rows = compete(entrants, options, progress)
    baselines = [row for row in rows if not row.method.startswith("arkv-")]
    return [row if row in baselines else row.against(baselines) for row in rows]


def _full_cache(case: Case, tokens: int, options: Options) -> Callable[[], tuple[Tensor, Tensor]]:
    """Makes keys and values [B, Hkv, N, D]."""

    def make() -> tuple[Tensor, Tensor]:
        k = options.random(case.heads, tokens, case.dim)
        return k, torch.randn_like(k)

    return make


def _over(attend: Attention, q: Tensor, full: Rotation[tuple[Tensor, Tensor]]) -> Call:
    return lambda: attend(q, *full())
