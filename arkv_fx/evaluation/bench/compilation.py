"""``compile``: CPU time until a model decodes, from nothing, from the disk, and recalibrated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from tempfile import TemporaryDirectory
from typing import Any

from arkv_fx.evaluation.bench.cases import Options
from arkv_fx.evaluation.bench.compile_once import Order
from arkv_fx.evaluation.bench.measurements import Measurement, dtype_name

BASELINES = ("dynamic-compiled", "static-compiled")


def compile_(options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    """Each in a process of its own: first with an empty cache of Inductor, then with a full one.

    Compile workers are switched off, so that the compilers' time is all counted.
    """
    rows: list[Measurement] = []
    empty = Measurement("compile", options.model, "", dtype_name(options.dtype))
    for method in (*(f"arkv-{name}" for name in options.lowerings), *BASELINES):
        slots = options.config(1024).budget
        order = Order(
            method, options.model, dtype_name(options.dtype), str(options.device), slots or 0,
            options.threads, options.backend, options.tiers,
        )  # fmt: skip
        row = replace(empty, slots=slots) if method.startswith("arkv") else empty
        with TemporaryDirectory() as folder:
            for start in ("cold", "warm"):
                progress(f"{options.model}: {method}, {start}")
                found = _run(order, folder)
                if "error" in found:
                    rows.append(replace(row, method=f"{method} {start}", note=found["error"]))
                    break
                graphs = found.pop("graphs", None)
                if start == "warm":  # recalibrating is the same from whichever start
                    found = {n: t for n, t in found.items() if not n.startswith("recalibrated")}
                for part, seconds in found.items():
                    name = f"{method} {part}" if " " in part else f"{method} {start} {part}"
                    note = None
                    if part == "recalibrated decode":
                        note = f"{graphs} graphs were generated anew"
                    rows.append(replace(row, method=name, cpu_s=seconds, note=note))
    baselines = [row for row in rows if row.method == "static-compiled cold decode"]
    return [row.against(baselines) if row.method.endswith("cold decode") else row for row in rows]


def _run(order: Order, folder: str) -> dict[str, Any]:
    """CPU-seconds by what was compiled, or why there are none under ``error``."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": folder,
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": str(order.threads),
    }
    command = [sys.executable, "-m", "arkv_fx.evaluation.bench.compile_once"]
    done = subprocess.run(
        [*command, json.dumps(asdict(order))], env=environment, capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": f"not available: {said[-1][:200]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
