"""What is measured: layer shapes by name, the options of a run, and filled states."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from arkv_fx.config import ArkvConfig
from arkv_fx.errors import UnknownOptionError
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.ops.no_output import NoOutput
from arkv_fx.plan import LayerPlan, plan_layer
from arkv_fx.state.session import LayerState


@dataclass(frozen=True)
class Case:
    """The attention of one layer: kv heads, query heads, head dimension."""

    name: str
    heads: int
    q_heads: int
    dim: int

    @property
    def scale(self) -> float:
        """What multiplies the logits."""
        return float(self.dim**-0.5)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("llama-3-8b", 8, 32, 128),
        Case("qwen3-8b", 8, 32, 128),
        Case("smollm2", 3, 9, 64),
    )
}
"""Layer shapes by name; one line adds one."""


def get_case(name: str) -> Case:
    """The case called ``name``, or of a shape written ``Hkv x Hq x D`` as in ``8x32x128``.

    Raises:
        UnknownOptionError: if it is neither.
    """
    if name in CASES:
        return CASES[name]
    if shape := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", name):
        heads, q_heads, dim = map(int, shape.groups())
        if q_heads % heads == 0:
            return Case(name, heads, q_heads, dim)
    raise UnknownOptionError(
        f"unknown case {name!r}; known: {', '.join(CASES)}, or kv heads x query heads x head "
        "dimension as in 8x32x128"
    )


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """How a benchmark runs; None takes the section's own default.

    Args:
        cases: layer shapes of the sections that time one layer.
        slots: tokens that the compressed cache holds per kv head.
        contexts: tokens that full caches hold.
        prompt: tokens of the prompt that ``prefill`` times.
        rounds: timed calls of each method; whole models take ``steps`` decode steps instead.
        lowerings: how transformed models run, see ``arkv_fx.transform``.
        backend: the ``torch.compile`` backend of everything else that is compiled.
        tiers: storage formats, most precise first.
        weights: kinds of quantized weights that ``linear`` times besides.
        model: a name as in ``arkv_fx.models.load``, or a config file: random weights.
    """

    cases: tuple[Case, ...] = (CASES["llama-3-8b"],)
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    batch: int = 1
    slots: int | None = None
    contexts: tuple[int, ...] | None = None
    prompt: int = 4096
    rounds: int = 20
    steps: int = 16
    threads: int = 1
    lowerings: tuple[str, ...] = ("inductor",)
    backend: str = "inductor"
    model: str = "smollm2"
    tiers: tuple[str, ...] | None = None
    weights: tuple[str, ...] = ()

    def config(self, slots: int) -> ArkvConfig:
        """The default configuration, but for ``tiers``, with room for so many tokens."""
        config = ArkvConfig(budget=self.slots or slots)
        return config if self.tiers is None else config.replace(tiers=self.tiers)

    def plan(self, case: Case, slots: int = 2048) -> LayerPlan:
        """The plan of a layer under ``config``."""
        return plan_layer(
            self.config(slots),
            heads=case.heads,
            k_dim=case.dim,
            v_dim=case.dim,
            dtype=self.dtype,
            positions=self.slots or slots,
        )

    def random(self, *shape: int) -> Tensor:
        """Normal numbers [B, *shape] in the run's dtype."""
        return torch.randn(self.batch, *shape, dtype=self.dtype, device=self.device)


def new_token(case: Case, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, 1, D], k and v [B, Hkv, 1, D] of a decode step."""
    shapes = (case.q_heads, case.heads, case.heads)
    q, k, v = (options.random(heads, 1, case.dim) for heads in shapes)
    return q, k, v


def filled(
    plan: LayerPlan, groups: int, tokens: int, batch: int, device: torch.device
) -> LayerState:
    """A state as after a prefill of ``tokens`` random tokens, ``groups`` query heads per kv head.

    The prompt's attention itself, which leaves nothing in the state, is left out.
    """
    state = LayerState(plan, batch, device)
    shape = (batch, plan.heads, tokens)
    q = torch.randn(batch, plan.heads * groups, tokens, plan.k_dim, dtype=plan.dtype, device=device)
    k = torch.randn(*shape, plan.k_dim, dtype=plan.dtype, device=device)
    v = torch.randn(*shape, plan.v_dim, dtype=plan.dtype, device=device)
    with NoOutput():
        attend(q, k, v, None, state.tensors, plan, Knobs(plan.k_dim**-0.5), fresh=True)
    return state
