"""The engines in an exported folder: for which GPU each is, and what goes in and comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arkv_fx.errors import EngineError
from arkv_fx.runtime.digests import digest_of, plain
from arkv_fx.runtime.manifest import FILE, GRAPHS, Sidecar
from arkv_fx.runtime.tensors import TensorInfo

CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
"""GPUs that TensorRT for RTX builds engines for, by compute capability."""
NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}
ITEMSIZE = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "int32": 4,
    "int64": 8,
}  # fmt: skip


def dtype_name(name: str) -> str:
    """What TensorRT's name of a dtype is elsewhere."""
    return NAMES.get(name, name.lower())


@dataclass(frozen=True)
class Binding:
    """What an engine takes or gives under a name; -1 in a shape is any length."""

    given: bool
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes, if the shape is fixed."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class EngineFile:
    """One engine. ``least`` and ``longest`` are tokens of a prompt, 1 for a decoded token.

    ``pieces`` says by (name of a state tensor in ``arkv.json``, place in its stack of layers) what
    the engine calls it: of e4m3 it takes each layer by itself.
    """

    path: Path
    capability: str
    least: int
    longest: int
    bindings: Mapping[str, Binding]
    pieces: Mapping[tuple[str, int], str]

    def check(self, found: Mapping[str, Binding]) -> None:
        """Compare with what the runtime says of the engine.

        Raises:
            EngineError: naming what differs.
        """
        if odd := sorted(
            name for name in {*found, *self.bindings} if found.get(name) != self.bindings.get(name)
        ):
            raise EngineError(
                f"{self.path}: not the engine that {FILE} tells of: it differs in "
                f"{', '.join(odd[:4])}; export again"
            )


def capabilities(sidecar: Sidecar) -> list[str]:
    """The GPUs for which a folder holds engines of both graphs, by compute capability.

    Raises:
        EngineError: if ``arkv.json`` is damaged.
    """
    try:
        there = [(str(e["capability"]), str(e["graph"])) for e in _entries(sidecar)]
    except (KeyError, TypeError) as error:
        raise _damaged(sidecar, error) from error
    names = dict.fromkeys(name for name, _ in there)
    return [name for name in names if all((name, graph) in there for graph in GRAPHS)]


def require_engines(sidecar: Sidecar) -> None:
    """Refuse a folder without engines of both graphs for any GPU.

    Raises:
        EngineError: saying how to export them.
    """
    if not capabilities(sidecar):
        raise EngineError(
            f"{sidecar.folder}: it holds no engines of both graphs: `arkv export MODEL --out "
            "FOLDER --target tensorrt`; ONNX Runtime runs it without (OnnxSession)"
        )


def engine_for(sidecar: Sidecar, graph: str, capability: str) -> EngineFile:
    """The engine of a graph for a GPU, which is the file that was written.

    Raises:
        EngineError: if there is none, saying how to export it; or it is damaged, of another export
            or of an older arkv_fx.
    """
    there = capabilities(sidecar)
    if capability not in CAPABILITIES:
        raise EngineError(
            f"this GPU is {capability}, for which TensorRT for RTX builds no engines: run the "
            f"folder by ONNX Runtime (OnnxSession), or on another GPU: {', '.join(CAPABILITIES)}"
        )
    if capability not in there:
        raise EngineError(
            f"{sidecar.folder}: it holds engines of both graphs for {', '.join(there) or 'no GPU'},"
            f" and this GPU is {capability}: `arkv export MODEL --out FOLDER --target tensorrt "
            f"--capability {capability}`"
        )
    wanted = capability, graph
    entry = next(e for e in _entries(sidecar) if (e["capability"], e["graph"]) == wanted)
    try:
        engine = _parse(sidecar, entry)
        said = sidecar.content["files"][engine.path.name]
        size, sha256 = int(said["bytes"]), str(said["sha256"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(sidecar, error) from error
    _check_file(engine.path, size, sha256)
    _check_bindings(sidecar, engine, graph)
    return engine


def _entries(sidecar: Sidecar) -> list[dict[str, Any]]:
    return list(sidecar.content.get("engines", ()))


def _damaged(sidecar: Sidecar, error: Exception) -> EngineError:
    return EngineError(
        f"{sidecar.folder / FILE}: what it says of engines is damaged, or an older arkv_fx's: "
        f"{type(error).__name__} {error}; export again"
    )


def _parse(sidecar: Sidecar, entry: Mapping[str, Any]) -> EngineFile:
    def binding(name: str, dtype: str, given: bool) -> Binding:
        shape = tuple(entry["shapes"][name])
        if dtype not in ITEMSIZE or not all(type(n) is int and n >= -1 for n in shape):
            raise ValueError(f"{name}: {dtype} {shape}")
        return Binding(given, dtype, shape)

    bindings = {
        name: binding(name, dtype, side == "inputs")
        for side in ("inputs", "outputs")
        for name, dtype in entry[side].items()
    }
    pieces = {(str(of), int(place)): str(name) for name, (of, place) in entry["state"].items()}
    least, longest = (int(entry.get(name, 1)) for name in ("least", "longest"))
    if not 1 <= least <= longest:
        raise ValueError(f"prompts of {least} to {longest} tokens")
    path = sidecar.folder / plain(entry["file"], sidecar.folder)
    return EngineFile(path, entry["capability"], least, longest, bindings, pieces)


def _check_file(path: Path, size: int, sha256: str) -> None:
    try:
        same = path.stat().st_size == size and digest_of(path) == sha256
    except OSError as error:
        raise EngineError(f"{path}: the engine is missing: {error}; export again") from error
    if not same:
        raise EngineError(
            f"{path}: not the engine that was exported (its size or SHA-256 differs): damaged, or "
            "another export's; export again"
        )


def _check_bindings(sidecar: Sidecar, engine: EngineFile, graph: str) -> None:
    """What goes in and comes out is what ``arkv.json`` says of the graph.

    Raises:
        EngineError: naming what is not.
    """
    batch, tokens = sidecar.batch, 1 if graph == "decode" else -1
    state = [t.output for t in sidecar.tensors]
    if graph == "decode":
        state += [t.input for t in sidecar.tensors]
    plain_inputs = [n for n in sidecar.content["graphs"][graph]["inputs"] if n not in state]
    wanted = {name: Binding(True, "int64", (batch, tokens)) for name in plain_inputs}
    found = dict(engine.bindings)
    logits = found.pop("logits", None)
    odd = [] if logits and logits.shape == (batch, 1, sidecar.vocabulary) else ["logits"]
    odd += [name for name, what in wanted.items() if found.pop(name, None) != what]
    for info in sidecar.tensors:
        for name in {info.input, info.output} & {*state}:
            held = sorted(place for of, place in engine.pieces if of == name)
            names = [engine.pieces[name, place] for place in held]
            parts = [found.pop(n) for n in names if n in found]
            if not _covers(parts, held, info, name == info.input):
                odd.append(name)
    odd += found
    if odd:
        raise EngineError(
            f"{engine.path}: it does not fit the {graph} graph that {FILE} tells of, in "
            f"{', '.join(odd[:4])}; export again"
        )


def _covers(parts: list[Binding], places: list[int], info: TensorInfo, given: bool) -> bool:
    """Whether tensors at these places of a stack are all of it, one after the other."""
    wanted = given, info.bytes_of or info.dtype, info.nbytes
    alike = all((p.given, p.dtype, p.nbytes * len(parts)) == wanted for p in parts)
    return bool(parts) and alike and places == [*range(len(parts))]
