"""Reading an exported folder's ``arkv.json``, and checking that its graphs are those it tells of.

Needs neither torch nor the onnx package, and unpickles nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arkv_fx.errors import EngineError
from arkv_fx.runtime.graph_file import GraphFile, read_graph_file
from arkv_fx.runtime.tensors import TensorInfo

FILE = "arkv.json"
VERSION = 2
METADATA = "arkv"
"""The key under which a graph's file carries the same."""
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
        return self.folder / _plain(self.content["graphs"][name]["file"], self.folder)

    @property
    def tokenizer(self) -> Path | None:
        """The file of the tokenizer, if one was saved."""
        name = self.content.get("tokenizer")
        return self.folder / _plain(name, self.folder) / "tokenizer.json" if name else None


def read_sidecar(folder: str | Path) -> Sidecar:
    """Read a folder that target "onnx" wrote.

    Raises:
        EngineError: naming what is missing, damaged, unknown or of another export.
    """
    folder = Path(folder)
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{folder}: no {FILE}; give a folder that `arkv export` wrote") from None
    except (OSError, ValueError) as error:
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
    try:
        sidecar = _parse(folder, content)
        weights = folder / _plain(content["weights"]["file"], folder)
        size, digest = int(content["weights"]["bytes"]), str(content["weights"]["sha256"])
        graphs = [sidecar.graph(name) for name in ("prefill", "decode")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{path}: damaged: {type(error).__name__} {error}") from error
    _check_weights(weights, size, digest)
    for graph in graphs:
        _check_graph(read_graph_file(graph), content, graph, weights.name, size)
    return sidecar


def _parse(folder: Path, content: dict[str, Any]) -> Sidecar:
    tensors = tuple(
        TensorInfo(t["input"], t["output"], tuple(t["shape"]), t["dtype"], t["fill"])
        for group in content["groups"]
        for t in group["tensors"]
    )
    model = content["model"]
    return Sidecar(
        folder, content, int(content["batch"]), int(content["least_prompt"]),
        int(model["vocabulary"]), tuple(model["eos_token_ids"]), tensors,
    )  # fmt: skip


def _plain(name: Any, folder: Path) -> str:
    """``name`` if it is that of a file in the folder itself.

    Raises:
        EngineError: if it leads elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise EngineError(f"{folder}: the file name {name!r} leads out of the folder; refused")
    return name


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


def _check_weights(path: Path, size: int, digest: str) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise EngineError(
                f"{path}: {found} bytes where {size} were written: truncated or replaced; "
                "export again"
            )
        if digest_of(path) != digest:
            raise EngineError(
                f"{path}: not the weights that were exported with these graphs (their SHA-256 "
                "differs): damaged, or another export's; export again"
            )
    except OSError as error:
        raise EngineError(f"{path}: the weights are missing: {error}") from error


def _check_graph(
    found: GraphFile, content: dict[str, Any], path: Path, weights: str, size: int
) -> None:
    opset = found.opsets.get("")
    if opset != OPSET:
        raise EngineError(f"{path}: opset {opset}; this arkv_fx runs opset {OPSET}")
    for name, end in found.external:
        _plain(name, path.parent)
        if name != weights or end > size:
            raise EngineError(
                f"{path}: it reads {end} bytes of {name!r}, and {weights!r} has {size}"
            )
    try:
        own = json.loads(found.metadata[METADATA])
    except (KeyError, ValueError) as error:
        raise EngineError(f"{path}: it was not written by arkv_fx (no metadata)") from error
    names = sorted(k for k in {*own, *content} if own.get(k) != content.get(k))
    if names not in ([], ["engines"]):  # engines are built from graphs that are written already
        raise EngineError(f"{path}: {FILE} is of another export: they differ in {', '.join(names)}")
