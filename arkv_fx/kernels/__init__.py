"""Kernels of the decode step's attention, by name.

To add one: a `Kernel` in a file of its own and `KERNELS.add(kernel)`. The reference defines what
all of them compute.
"""

from __future__ import annotations

import torch

from arkv_fx.kernels import cpp, gpu, inductor, reference, selection
from arkv_fx.kernels.kernel import Attend, Encoder, Kernel, Step, WholeStep, Writer
from arkv_fx.plan import LayerPlan
from arkv_fx.registry import Registry

__all__ = [
    "KERNELS", "Attend", "Encoder", "Kernel", "Step", "WholeStep", "Writer", "get_direct_step",
    "get_kernel", "get_step", "missing_forms", "usable",
]  # fmt: skip

KERNELS: Registry[Kernel] = Registry(
    "kernel",
    (
        reference.KERNEL,
        inductor.KERNEL,
        cpp.KERNEL,
        gpu.KERNEL,
        selection.KERNEL,
        selection.SUMS,
    ),
)


def get_kernel(name: str) -> Attend:
    """The attention of the kernel called ``name``; raises ``UnknownOptionError`` with the names."""
    return KERNELS.find(name).attend


def get_step(kernel: str, plan: LayerPlan) -> Step | None:
    """The whole decode step of a kernel, None if it has none that knows the plan."""
    step = KERNELS.find(kernel).step
    return step.traced(plan) if step else None


def get_direct_step(kernel: str, plan: LayerPlan) -> Step | None:
    """The same for one layer of a compiled graph, called with real tensors."""
    step = KERNELS.find(kernel).step
    return step.direct(plan) if step else None


def usable(device: torch.device, plan: LayerPlan | None = None, compiled: bool = True) -> list[str]:
    """Names of the kernels that can run on ``device``, the one to take first.

    With a ``plan``, those that know its formats: a new format is known to the plain-torch ones.
    Not ``compiled``: those that are fast in a graph that is run as it is.
    """
    return [
        kernel.name
        for kernel in _by_priority(device)
        if (plan is None or not kernel.lacks(plan)) and (compiled or not kernel.for_inductor)
    ]


def missing_forms(device: torch.device, plan: LayerPlan, compiled: bool = True) -> list[str]:
    """Which kernels would be taken on ``device`` if they knew the formats, and what is instead."""
    lacking = [k for k in KERNELS.values() if k.priority is not None and k.lacks(plan)]
    if not lacking:  # to ask whether a kernel can run here may compile it
        return []
    able = [kernel.name for kernel in _by_priority(device)]
    taken = usable(device, plan, compiled)[0]
    return [
        f"kernel {kernel.name!r} has no form of {' and '.join(kernel.lacks(plan))}: layers that "
        f"store it decode with kernel {taken!r}"
        for kernel in lacking
        if kernel.name in able[: able.index(taken)]
    ]


def _by_priority(device: torch.device) -> list[Kernel]:
    able = [k for k in KERNELS.values() if k.priority is not None and not k.obstacle(device)]
    return sorted(able, key=lambda kernel: -(kernel.priority or 0))
