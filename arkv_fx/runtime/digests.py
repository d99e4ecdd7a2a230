"""Which files an exported folder is made of, and whether they are those that were written.

``arkv.json`` holds a digest of each. Weights that are others are refused. A graph that a tool has
rewritten (a quantizer, an optimizer) still says in its metadata which export it is of: it runs,
under a warning, until ``sign`` has taken it over.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from arkv_fx.errors import EngineError
from arkv_fx.runtime.graph_file import GraphFile

_digests: dict[tuple[Path, int, int], str] = {}


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; read once as long as its size and time are the same.

    Raises:
        OSError: if it cannot be read.
    """
    stat = path.stat()
    key = (path.resolve(), stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def said_of(path: Path) -> dict[str, Any]:
    """What ``arkv.json`` says of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest_of(path)}


def plain(name: Any, folder: str | PathLike[str]) -> str:
    """``name`` if it is that of a file in the folder itself.

    Raises:
        EngineError: if it leads elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise EngineError(f"{folder}: the file name {name!r} leads out of the folder; refused")
    return name


def check_files(
    folder: Path, graphs: Mapping[str, GraphFile], said: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compare the graphs (by file name) and all that they read with what ``arkv.json`` says.

    Raises:
        EngineError: for weights that are missing, too short, or others than were exported.
    """
    rewritten = []
    for name, graph in graphs.items():
        own = said_of(folder / name) == said.get(name)
        if not own:
            rewritten.append(name)
        for weights, end in graph.external:
            plain(weights, folder)
            known = said.get(weights)
            if known is None and own:
                raise EngineError(
                    f"{folder / name}: it reads {weights!r}, of which arkv.json says nothing: "
                    "damaged; export again"
                )
            _check_weights(folder / weights, known, end, name)
            if known is None and weights not in rewritten:
                rewritten.append(weights)
    if rewritten:
        warnings.warn(
            f"{folder}: {', '.join(rewritten)} changed since the export, and what is computed is "
            "not checked. If you quantized or optimized the graphs yourself, say so once: "
            f"arkv_fx.runtime.sign({str(folder)!r}); if not, export again",
            stacklevel=4,
        )


def _check_weights(path: Path, known: Mapping[str, Any] | None, end: int, graph: str) -> None:
    try:
        size = path.stat().st_size
        if known is not None and size != known["bytes"]:
            raise EngineError(
                f"{path}: {size} bytes where {known['bytes']} were written: truncated or replaced; "
                "export again"
            )
        if end > size:
            raise EngineError(
                f"{path.with_name(graph)}: it reads {end} bytes of {path.name!r}, and "
                f"{path.name!r} has {size}"
            )
        if known is not None and digest_of(path) != known["sha256"]:
            raise EngineError(
                f"{path}: not the weights that were exported with these graphs (their SHA-256 "
                "differs): damaged, or another export's; export again"
            )
    except OSError as error:
        raise EngineError(f"{path}: the weights are missing: {error}") from error
