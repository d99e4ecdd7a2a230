"""``arkv_cpu::step``: a whole decode step, attention and the state after it, in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from arkv_fx.errors import KernelError
from arkv_fx.ops.attention import Knobs
from arkv_fx.ops.kernels.cpp.arguments import check, codecs, library, readable, sink
from arkv_fx.ops.kernels.cpp.build import load
from arkv_fx.ops.scores.combined import CombinedScore
from arkv_fx.ops.scores.mass import MassScore, log2_of
from arkv_fx.ops.scores.novelty import NoveltyScore
from arkv_fx.plan import LayerPlan


class Constants(NamedTuple):
    """What a plan fixes of the operator's arguments.

    ``options`` are sinks, sliding window, and 0 or 1 each for: a centre, the statistics mass, norm
    and novelty, masses normalised for age; ``weights`` the binary logarithm of the decay and the
    margin.
    """

    codecs: list[int]
    options: list[int]
    weights: list[float]


@lru_cache(maxsize=256)
def _constants(plan: LayerPlan) -> Constants | None:
    """None if the plan is none that the operator knows."""
    policy, numbers = plan.policy(), codecs(plan)
    # Not their subclasses, which may rank otherwise.
    if numbers is None or type(policy) not in (MassScore, NoveltyScore, CombinedScore):
        return None
    mass = policy.mass if isinstance(policy, CombinedScore) else policy
    decay, age = (mass.decay, mass.use_age) if isinstance(mass, MassScore) else (0.0, False)
    margin = policy.margin if isinstance(policy, CombinedScore) else 0.0
    names = {f.name for f in policy.slot_fields}
    has = [int(name in names) for name in ("mass", "norm", "novelty")]
    options = [plan.sinks, plan.sliding, int(plan.centred), *has, int(age)]
    return Constants(numbers, options, [log2_of(decay), margin])


def knows(plan: LayerPlan) -> bool:
    """Whether the operator computes this plan's formats and score."""
    return _constants(plan) is not None


def step_cpp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Sequence[Tensor], plan: LayerPlan,
    knobs: Knobs,
) -> Tensor:  # fmt: skip
    """See ``WholeStep``; the accuracy is that of ``attend_cpp``.

    Raises:
        KernelError: for tensors elsewhere than on a CPU or of another dtype; for a plan that is not
            known; without a compiler.
    """
    check(q, plan)
    constants = _constants(plan)
    if constants is None:
        raise KernelError(
            f"the C++ step does not know the score {plan.score!r} or a format of this layer; "
            "choose the kernel 'reference'"
        )
    q, k, v = q.detach().contiguous(), k.detach().contiguous(), v.detach().contiguous()
    out: Tensor = torch.ops.arkv_cpu.step.default(
        q, k, v, readable(mask), sink(knobs), state, *constants, knobs.scale, knobs.softcap
    )
    return out


library.define(
    "step(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sink, Tensor(a!)[] state, "
    "int[] codecs, int[] options, float[] weights, float scale, float softcap) -> Tensor"
)


def _step(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None,
    state: Sequence[Tensor], codecs: Sequence[int], options: Sequence[int],
    weights: Sequence[float], scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Loads the library and runs what takes its place, as for ``attend``.

    Args:
        state: contiguous, in the order of ``LayerPlan.specs``; updated in place.
        codecs: as well as ``options`` and ``weights``, see ``Constants``.

    Returns:
        [B, H * G, 1, Dv] in q's dtype.
    """
    load()
    out: Tensor = torch.ops.arkv_cpu.step(
        q, k, v, mask, sink, state, codecs, options, weights, scale, softcap
    )
    return out


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None,
    state: Sequence[Tensor], codecs: Sequence[int], options: Sequence[int],
    weights: Sequence[float], scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:3], v.shape[3]))


library.impl("step", _step, "CompositeExplicitAutograd")
torch.library.register_fake("arkv_cpu::step", _fake, lib=library)
