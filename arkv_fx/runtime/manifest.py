"""Reading an exported folder's ``arkv.json``, and checking that its graphs are those it tells of.

Needs neither torch nor the onnx package, and unpickles nothing.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from arkv_fx.errors import EngineError
from arkv_fx.runtime.digests import check_files, plain
from arkv_fx.runtime.graph_file import GraphFile, read_graph_file
from arkv_fx.runtime.tensors import TensorInfo

FILE = "arkv.json"
GRAPHS = ("prefill", "decode")
VERSION = 3
METADATA = "arkv"
"""The key under which a graph's file carries the same, but for what came later."""
LATER = ("files", "engines")
OPSET = 21


@dataclass(frozen=True)
class Sidecar:
    """What ``arkv.json`` says; ``content`` is all of it."""

    folder: Path
    content: dict[str, Any]
    batch: int
    least_prompt: int
    vocabulary: int
    eos: tuple[int, ...]
    tensors: tuple[TensorInfo, ...]

    @property
    def padding(self) -> bool:
        """Whether prompts may have padding."""
        return "attention_mask" in self.content["graphs"]["prefill"]["inputs"]

    @property
    def longest_text(self) -> int | None:
        """The most tokens that the model knows positions for; None if there is no end."""
        found: int | None = self.content.get("longest_text")
        return found

    def graph(self, name: str) -> Path:
        """The file of the graph "prefill" or "decode"."""
        return self.folder / plain(self.content["graphs"][name]["file"], self.folder)

    @property
    def tokenizer(self) -> Path | None:
        """The file of the tokenizer, if one was saved."""
        name = self.content.get("tokenizer")
        return self.folder / plain(name, self.folder) / "tokenizer.json" if name else None


def read_sidecar(folder: str | PathLike[str], *, check: bool = True) -> Sidecar:
    """Read a folder that target "onnx" wrote.

    Args:
        check: whether its files must be those that were written (or signed).

    Raises:
        EngineError: naming what is missing, damaged, unknown or of another export.
    """
    sidecar = read_description(folder)
    with _damaged(sidecar.folder / FILE):
        said = {str(name): _said(entry) for name, entry in sidecar.content["files"].items()}
        graphs = {path.name: path for path in map(sidecar.graph, GRAPHS)}
        if lacking := sorted({*graphs} - {*said}):
            raise ValueError(f"files says nothing of {', '.join(lacking)}")
    found = {name: read_graph_file(path) for name, path in graphs.items()}
    for name, graph in found.items():
        _check_graph(graph, sidecar.content, graphs[name])
    if check:
        check_files(sidecar.folder, found, said)
    return sidecar


def read_description(folder: str | PathLike[str]) -> Sidecar:
    """Read ``arkv.json`` alone: other files need not be there, and none is looked at.

    Raises:
        EngineError: as ``read_sidecar``.
    """
    folder = Path(folder)
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{folder}: no {FILE}; give a folder that `arkv export` wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path}: cannot be read: {error}") from error
    found = content.get("version") if isinstance(content, dict) else None
    if found != VERSION:
        raise EngineError(
            f"{path}: format version {found!r}; this arkv_fx reads version {VERSION}: export again"
        )
    if "opset" not in content:
        raise EngineError(
            f"{path}: target {content.get('target')!r} holds no ONNX files; export with target onnx"
        )
    if content["opset"] != OPSET:
        raise EngineError(f"{path}: opset {content['opset']!r}; this arkv_fx runs opset {OPSET}")
    with _damaged(path):
        return _parse(folder, content)


@contextmanager
def _damaged(path: Path) -> Generator[None]:
    """Within it what does not fit is said to be damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EngineError(f"{path}: damaged: {type(error).__name__} {error}") from error


def _said(entry: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}


def _parse(folder: Path, content: dict[str, Any]) -> Sidecar:
    tensors = tuple(TensorInfo.parse(t) for group in content["groups"] for t in group["tensors"])
    model, graphs = content["model"], [content["graphs"][name] for name in GRAPHS]
    batch, least = _count(content, "batch"), _count(content, "least_prompt")
    if content.get("longest_text") is not None:
        _count(content, "longest_text")
    for graph in graphs:
        if not all(isinstance(name, str) for name in graph["inputs"]):
            raise TypeError("names of inputs")
    eos = tuple(int(token) for token in model["eos_token_ids"])
    return Sidecar(folder, content, batch, least, _count(model, "vocabulary"), eos, tensors)


def _count(where: dict[str, Any], name: str) -> int:
    value = where[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}, not a whole number >= 1")
    return value


def _check_graph(found: GraphFile, content: dict[str, Any], path: Path) -> None:
    opset = found.opsets.get("")
    if opset != OPSET:
        raise EngineError(f"{path}: opset {opset}; this arkv_fx runs opset {OPSET}")
    try:
        own = json.loads(found.metadata[METADATA])
    except (KeyError, ValueError) as error:
        raise EngineError(f"{path}: it was not written by arkv_fx (no metadata)") from error
    names = sorted(k for k in {*own, *content} if own.get(k) != content.get(k))
    if names := [name for name in names if name not in LATER]:
        raise EngineError(f"{path}: {FILE} is of another export: they differ in {', '.join(names)}")
