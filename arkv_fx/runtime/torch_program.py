"""``load_program``: graphs of target "torch" in a process that knows nothing of their model."""

from __future__ import annotations

import json
import re
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile, ZipFile

from arkv_fx.errors import EngineError
from arkv_fx.runtime.digests import plain
from arkv_fx.runtime.manifest import FILE

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def load_program(folder: str | PathLike[str], graph: str = "decode") -> ExportedProgram:
    """Load a graph that target "torch" wrote; ``.module()`` makes it a function.

    Needs torch, but neither transformers nor the model: what plain ``torch.export.load`` lacks are
    the operators that the graphs carry. ``arkv.json`` names what it takes and gives, in order. As
    with ``torch.export.load``, load only files that you trust.

    Args:
        folder: what ``arkv_fx.export(..., target="torch")`` wrote.
        graph: "prefill" or "decode".

    Raises:
        EngineError: if there is no such graph, or it is damaged.
    """
    import torch

    import arkv_fx.runtime.operators  # noqa: F401  (registers the operators)

    folder = Path(folder)
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        target, graphs = content["target"], content["graphs"]
        file = plain(graphs[graph].get("file"), folder) if graph in graphs else None
    except FileNotFoundError:
        raise EngineError(f"{folder}: no {FILE}; give a folder that `arkv export` wrote") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(f"{folder / FILE}: damaged: {type(error).__name__} {error}") from error
    if target != "torch":
        raise EngineError(f"{folder}: target {target!r}; load_program loads that of target 'torch'")
    if file is None:
        raise EngineError(f"graph={graph!r}: there are {', '.join(map(repr, graphs))}")
    try:
        return torch.export.load(folder / file)
    except Exception as error:  # whatever its readers raise
        said = str(error)
        if missing := _missing(folder / file):
            said = f"it calls {', '.join(missing)}: import what registers that first"
        raise EngineError(f"{folder / file}: torch cannot load it: {said}") from error


def _missing(file: Path) -> list[str]:
    """Operators of a saved program that no library has registered in this process."""
    import torch

    called: set[tuple[str, str]] = set()
    try:
        with ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    text = archive.read(name).decode("utf-8", "replace")
                    called |= set(re.findall(r'"torch\.ops\.(\w+)\.(\w+)[."]', text))
    except (OSError, BadZipFile):
        return []
    return sorted(f"{s}::{o}" for s, o in called if not hasattr(getattr(torch.ops, s), o))
