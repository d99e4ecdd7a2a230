"""Target "tensorrt": what target "onnx" writes, and an engine of the decode graph for each GPU.

Engines are built by TensorRT for RTX, on any machine; only running them needs a GPU. The prompt is
left to the ONNX graph: its length varies, and TensorRT sorts no more than 3840 tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arkv_fx.errors import ExportError, UnknownOptionError
from arkv_fx.export import onnx
from arkv_fx.export.programs import Programs

CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
FP8_FROM = 89
LIMIT_S = 600.0


def write(
    folder: Path,
    programs: Programs,
    sidecar: dict[str, Any],
    progress: Callable[[str], None],
    capabilities: Sequence[str] = ("SM86", "SM89", "SM120"),
    limit_s: float = LIMIT_S,
) -> None:
    """Write ``decode.SM89.engine`` and so on; the sidecar's ``engines`` say what is in them.

    Args:
        capabilities: compute capabilities of GPUs, names in ``CAPABILITIES``.
        limit_s: seconds that one build may take.

    Raises:
        UnknownOptionError: for a capability that TensorRT does not build for.
        ExportError: if the package is missing, fp8 is asked for where there is none, or a build
            fails or takes too long.
    """
    _check(capabilities, _formats(sidecar))
    onnx.require("tensorrt_rtx")
    onnx.write(folder, programs, sidecar, progress)
    sidecar["engines"] = []
    for capability in capabilities:
        progress(f"build the decode engine for {capability}")
        file = f"decode.{capability}.engine"
        found = build(folder / "decode.onnx", folder / file, capability, limit_s)
        sidecar["engines"].append({"file": file, "capability": capability, **found})


def build(graph: Path, engine: Path, capability: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Build one engine in a process of its own; its time, bytes, kernels and input dtypes.

    Raises:
        ExportError: with what TensorRT said, or that the process ended or took too long.
    """
    script = Path(__file__).with_name("engine_build.py")
    # -P: else this folder's onnx.py would be what `import onnx` finds.
    command = [sys.executable, "-P", str(script), str(graph), str(engine), capability]
    where = f"{graph.name} for {capability}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
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
    return found


def _formats(sidecar: dict[str, Any]) -> set[str]:
    return {tier["format"] for group in sidecar["groups"] for tier in group["tiers"]}


def _check(capabilities: Sequence[str], formats: set[str]) -> None:
    if unknown := [c for c in capabilities if c not in CAPABILITIES]:
        raise UnknownOptionError(
            f"unknown compute capabilities {', '.join(map(repr, unknown))}; TensorRT for RTX "
            f"builds for {', '.join(CAPABILITIES)}"
        )
    old = [c for c in capabilities if int(c.removeprefix("SM")) < FP8_FROM]
    if "fp8" in formats and old:
        raise ExportError(
            f"{', '.join(old)} have no fp8: it begins with SM{FP8_FROM}; take int8, or newer GPUs"
        )
