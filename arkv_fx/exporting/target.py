"""What a target is: a way to write graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def _refuse_nothing(config: object, **options: object) -> None:
    return None


@dataclass(frozen=True)
class Target:
    """``write(folder, programs, sidecar, progress, **options)`` writes files and completes the
    sidecar (arkv.json), which is written after it; ``options`` are the names it takes.

    ``check(config, **options)`` refuses, before the model is captured, what needs no graph to be
    refused. ``portable`` graphs have no inputs and outputs of dtypes that some runtimes lack:
    bfloat16 and float8 cross as their bytes. Models with weights of a dtype in ``lacking`` are
    refused: what runs the files cannot compute with them.
    """

    name: str
    write: Callable[..., None]
    options: tuple[str, ...] = ()
    check: Callable[..., None] = _refuse_nothing
    portable: bool = False
    lacking: tuple[torch.dtype, ...] = ()
