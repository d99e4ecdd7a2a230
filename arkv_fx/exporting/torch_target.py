"""Target "torch": each graph as an ``ExportedProgram``, for ``torch.export.load``.

``arkv_fx.runtime.load_program`` loads them: it registers the operators that the graphs carry.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arkv_fx.exporting.programs import Programs
from arkv_fx.exporting.target import Target


def write(
    folder: Path, programs: Programs, sidecar: dict[str, Any], progress: Callable[[str], None]
) -> None:
    """``prefill.pt2`` and ``decode.pt2``; arguments and results in the sidecar's order."""
    for graph in programs.graphs:
        file = f"{graph.name}.pt2"
        progress(f"write {file}")
        torch.export.save(graph.program, folder / file)
        sidecar["graphs"][graph.name]["file"] = file


TARGET = Target("torch", write)
