"""Target "tensorrt": what target "onnx" writes, and engines of both graphs for each GPU.

Engines are built by TensorRT for RTX, on any machine; only running them needs a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ExportError, UnknownOptionError
from arkv_fx.exporting import onnx_target
from arkv_fx.exporting.groups import places
from arkv_fx.exporting.programs import PAST, PRESENT, Programs
from arkv_fx.exporting.target import Target
from arkv_fx.formats import get_format
from arkv_fx.formats.codec import ByteCodec
from arkv_fx.runtime.digests import said_of
from arkv_fx.runtime.engine_files import CAPABILITIES, dtype_name

DEFAULT = ("SM86", "SM89", "SM120")
GRAPHS = ("prefill", "decode")
FP8_FROM = 89
LIMIT_S = 600.0
FORM = "{}_for_engines"


def write(
    folder: Path,
    programs: Programs,
    sidecar: dict[str, Any],
    progress: Callable[[str], None],
    capabilities: Sequence[str] = DEFAULT,
    graphs: Sequence[str] = GRAPHS,
    longest: int | None = None,
    limit_s: float = LIMIT_S,
) -> None:
    """Write ``decode.SM89.engine`` and so on; the sidecar's ``engines`` say what is in them.

    An engine of the decode graph reads codes inside the kernels that sum over them: it is built
    from another form of the graph than ONNX Runtime gets. Engines take bfloat16 and float8 as such
    where ONNX Runtime takes their bytes: the same memory. ``state`` says for each of their tensors
    which of the graphs' it is, and of stacked ones the first layer: e4m3 is not stacked in engines.

    Args:
        capabilities: compute capabilities of GPUs, names in ``CAPABILITIES``.
        graphs: which graphs get engines.
        longest: tokens of the longest prompt that an engine takes; None: see ``Programs.span``.
        limit_s: seconds that one build may take.

    Raises:
        ExportError: if ``longest`` is too short or too long, or a build fails or takes too long.
    """
    spans = {"decode": (0, 0)}
    if "prefill" in graphs:
        spans["prefill"] = programs.span(longest, sidecar["config"])
    wanted = {graph.name: graph for graph in programs.graphs}
    for name in graphs:
        progress(f"trace the {name} graph for engines")
        wanted[FORM.format(name)] = programs.engine(name)
    onnx_target.write_graphs(folder, wanted, sidecar, progress)
    sidecar["engines"] = []
    state: dict[str, list[Any]] = {}
    for prefix in (PAST, PRESENT):
        state |= places(programs.engine_groups, programs.groups, prefix)
    for name in graphs:
        source = folder / f"{FORM.format(name)}.onnx"
        span = spans[name]
        for capability in capabilities:
            progress(f"build the {name} engine for {capability}")
            file = f"{name}.{capability}.engine"
            found = build(source, folder / file, capability, limit_s, span)
            if name == "prefill":
                found |= {"least": span[0], "longest": span[1]}
            found["state"] = {n: state[n] for n in found["shapes"] if n in state}
            entry = {"file": file, "graph": name, "capability": capability}
            sidecar["engines"].append(entry | found)
            sidecar["files"][file] = said_of(folder / file)
        source.unlink()


def build(
    graph: Path, engine: Path, capability: str, limit_s: float = LIMIT_S,
    span: tuple[int, int] = (0, 0),
) -> dict[str, Any]:  # fmt: skip
    """Build one engine in a process of its own; see ``engine_build.build`` for what it gives.

    Args:
        span: the least and the largest size of dimensions that vary.

    Raises:
        ExportError: with what TensorRT said, or that the process ended or took too long.
    """
    script = Path(__file__).with_name("engine_build.py")
    arguments = [str(graph), str(engine), capability, *map(str, span)]
    where = f"{graph.name} for {capability}"
    try:
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True, text=True, timeout=limit_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"{where}: TensorRT took more than {limit_s:g} seconds; raise limit_s"
        ) from None
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        raise ExportError(
            f"{where}: the builder ended with exit code {done.returncode}: {done.stderr[-300:]}"
        ) from None
    if "error" in found:
        raise ExportError(f"{where}: TensorRT builds no engine: {found['error']}")
    for side in ("inputs", "outputs"):
        found[side] = {name: dtype_name(dtype) for name, dtype in found[side].items()}
    return found


def check(
    config: ArkvConfig, capabilities: Sequence[str] = DEFAULT, graphs: Sequence[str] = GRAPHS,
    longest: int | None = None, **options: Any,
) -> None:  # fmt: skip
    """Refuse what needs no graph to be refused; options as in ``write``.

    Raises:
        UnknownOptionError: for a capability or a graph that there is not.
        ExportError: if a package is missing, ``longest`` is no number of tokens, or fp8 is asked
            for where there is none.
    """
    check_longest(longest)
    if unknown := [c for c in capabilities if c not in CAPABILITIES]:
        raise UnknownOptionError(
            f"unknown compute capabilities {', '.join(map(repr, unknown))}; TensorRT for RTX "
            f"builds for {', '.join(CAPABILITIES)}"
        )
    if unknown := [g for g in graphs if g not in GRAPHS]:
        raise UnknownOptionError(f"unknown graphs {unknown}; there are 'prefill' and 'decode'")
    check_formats(config)
    old = [c for c in capabilities if int(c.removeprefix("SM")) < FP8_FROM]
    if stores_float8(config) and old:
        raise ExportError(
            f"{', '.join(old)} have no fp8: it begins with SM{FP8_FROM}; take int8, or newer GPUs"
        )
    onnx_target.require("onnx", "onnxscript", "tensorrt_rtx")


def check_longest(longest: int | None) -> None:
    """Refuse what is neither None nor a whole number >= 1."""
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ExportError(f"longest={longest!r}: must be a whole number of tokens, >= 1")


def check_formats(config: ArkvConfig) -> None:
    """Refuse tiers whose bytes TensorRT cannot read.

    Raises:
        ExportError: naming the format and what it stores.
    """
    for name in config.tiers:
        codecs = get_format(name).exported().codecs
        if strange := {codec.name for codec in codecs if isinstance(codec, ByteCodec)}:
            raise ExportError(
                f"format {name!r} stores {', '.join(sorted(strange))}, whose bytes TensorRT cannot "
                "read; take another, or target 'onnx'"
            )


def stores_float8(config: ArkvConfig) -> bool:
    """Whether a tier is held in float8."""
    codecs = [c for name in config.tiers for c in get_format(name).exported().codecs]
    fields = [f for c in codecs for f in c.fields(c.multiple, torch.float32)]
    return any(field.dtype == torch.float8_e4m3fn for field in fields)


TARGET = Target(
    "tensorrt", write, ("capabilities", "graphs", "longest", "limit_s"), check, portable=True
)
