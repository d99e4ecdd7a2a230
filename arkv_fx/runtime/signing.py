"""``sign(folder)``: graphs that were rewritten on purpose are taken over."""

from __future__ import annotations

import json
from os import PathLike

from arkv_fx.errors import EngineError
from arkv_fx.runtime.digests import plain, said_of
from arkv_fx.runtime.graph_file import read_graph_file
from arkv_fx.runtime.manifest import FILE, GRAPHS, read_sidecar


def sign(folder: str | PathLike[str]) -> None:
    """Take over graphs that you have rewritten: quantized, optimized, with other weights.

    ``arkv.json`` then holds the digests of the files as they are now, and a session opens them
    without a warning. They must still be graphs of this export, as their metadata says. Engines
    stay those of the graphs as they were exported.

    Raises:
        EngineError: if the folder is damaged, or a graph is of another export.
    """
    sidecar = read_sidecar(folder, check=False)
    paths = [sidecar.graph(name) for name in GRAPHS]
    weights = {plain(name, folder) for path in paths for name, _ in read_graph_file(path).external}
    paths += [sidecar.folder / name for name in sorted(weights)]
    new = sidecar.folder / f".{FILE}.new"
    try:
        engines = {str(entry["file"]) for entry in sidecar.content.get("engines", ())}
        files = {n: said for n, said in sidecar.content["files"].items() if n in engines}
        files |= {path.name: said_of(path) for path in paths}
        content = sidecar.content | {"files": files}
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        new.replace(sidecar.folder / FILE)
    except (OSError, KeyError, TypeError) as error:
        raise EngineError(
            f"{folder}: it cannot be signed: {type(error).__name__} {error}"
        ) from error
