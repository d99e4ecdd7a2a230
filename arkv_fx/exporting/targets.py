"""What graphs can be written as: one file each, one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from arkv_fx.exporting import (
    onnx_target,
    tensorrt_target,
    torch_target,
    torch_tensorrt_target,
)


@dataclass(frozen=True)
class Target:
    """``write(folder, programs, sidecar, progress, **options)`` writes files and completes the
    sidecar, which is written after it; ``options`` are the names it takes.

    ``check(config, **options)`` refuses, before the model is captured, what needs no graph to be
    refused.
    """

    write: Callable[..., None]
    options: tuple[str, ...] = ()
    check: Callable[..., None] = lambda config, **options: None


TARGETS: Mapping[str, Target] = {
    "onnx": Target(onnx_target.write),
    "tensorrt": Target(
        tensorrt_target.write,
        ("capabilities", "graphs", "longest", "limit_s"),
        tensorrt_target.check,
    ),
    "torch": Target(torch_target.write),
    "torch_tensorrt": Target(
        torch_tensorrt_target.write, ("longest",), torch_tensorrt_target.check
    ),
}
