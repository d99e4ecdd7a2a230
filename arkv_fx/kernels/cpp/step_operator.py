"""``arkv_cpu::step``: a whole decode step, attention and the state after it, in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from arkv_fx.kernels.cpp.arguments import check, codecs, library, readable, sink
from arkv_fx.kernels.cpp.build import load
from arkv_fx.kernels.kernel import Step
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan
from arkv_fx.registry import forgets
from arkv_fx.scores import CppRank, Score
from arkv_fx.scores.mass import log2_of


class Constants(NamedTuple):
    """What a plan fixes of the operator's arguments.

    ``options`` are sinks, sliding window, and 0 or 1 each for: a centre, the statistics mass (2 in
    float32), norm and novelty, masses normalised for age, balanced channels, positions in int16,
    novelty of values; and ``LayerPlan.ahead``. ``weights`` are the binary logarithm of the decay
    and the margin.
    """

    codecs: list[int]
    options: list[int]
    weights: list[float]


def constants_of(plan: LayerPlan) -> Constants | None:
    """None if the plan is none that the operator knows."""
    policy, numbers = plan.policy(), codecs(plan)
    rank = policy.cpp()
    if numbers is None or rank is None or not _as_the_library_reads(policy, rank, plan):
        return None
    held = {f.name: f.dtype for f in policy.slot_fields}
    has = [STATISTICS[n].index(held[n]) + 1 if n in held else 0 for n in STATISTICS]
    of_values = len(policy.layer_fields(plan.k_dim, plan.v_dim)) == 2
    flags = [rank.age, plan.balanced, plan.short_positions, of_values]
    options = [plan.sinks, plan.sliding, int(plan.centred), *has, *map(int, flags), plan.ahead]
    return Constants(numbers, options, [log2_of(rank.decay), rank.margin])


STATISTICS = {
    "mass": (torch.float16, torch.float32), "norm": (torch.bfloat16,), "novelty": (torch.int8,),
}  # fmt: skip
"""What each may be held in, in the order in which the library walks through the state."""


def _as_the_library_reads(policy: Score, rank: CppRank, plan: LayerPlan) -> bool:
    """Whether a score's tensors are those that the library knows, and no others."""
    found = policy.slot_fields
    names = [f.name for f in found]
    in_order = names == [name for name in STATISTICS if name in names]
    known = in_order and all(f.dtype in STATISTICS[f.name] and f.width == 1 for f in found)
    sums = [(f.name, f.dtype, f.width) for f in policy.layer_fields(plan.k_dim, plan.v_dim)]
    dims = {"key_sum": plan.k_dim, "value_sum": plan.v_dim} if "novelty" in names else {}
    needed = [(name, torch.float32, dim) for name, dim in dims.items()]
    return known and rank.ahead == policy.ahead and sums in (needed, needed[:1])


@forgets
@lru_cache(maxsize=256)
def make_step(plan: LayerPlan) -> Step | None:
    """See ``Step``, None for a plan that the operator does not know; accurate as ``attend_cpp``.

    The step raises ``KernelError`` for tensors elsewhere than on a CPU or of another dtype, and
    without a compiler.
    """
    constants = constants_of(plan)
    if constants is None:
        return None
    operator, dtype = torch.ops.arkv_cpu.step.default, plan.dtype

    # One call per layer and token, each time on a cold cache: every look at a tensor counts, and
    # the operator sees for itself to what can wait until it is needed.
    def step(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Sequence[Tensor], knobs: Knobs
    ) -> Tensor:
        if not q.is_cpu or q.dtype != dtype:
            check(q, plan)
        out: Tensor = operator(
            q, k, v, readable(mask), sink(knobs), state, *constants, knobs.scale, knobs.softcap
        )
        return out

    return step


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
        q: of any strides, as are k and v.
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
library.impl("step", torch.library.fallthrough_kernel, "Autograd")  # it is not differentiated
torch.library.register_fake("arkv_cpu::step", _fake, lib=library)
