"""What graphs can be written as: one file each, one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from arkv_fx.export import onnx, tensorrt, torch_program, torch_tensorrt


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
    "onnx": Target(onnx.write),
    "tensorrt": Target(
        tensorrt.write, ("capabilities", "graphs", "longest", "limit_s"), tensorrt.check
    ),
    "torch": Target(torch_program.write),
    "torch_tensorrt": Target(torch_tensorrt.write, ("longest",), torch_tensorrt.check),
}
