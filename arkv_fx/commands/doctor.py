"""``arkv doctor``: what is installed, and what will run here."""

from __future__ import annotations

import json as json_
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from itertools import chain
from typing import Annotated, Any

import torch
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import arkv_fx
from arkv_fx.commands.console import out
from arkv_fx.evaluation.results import table
from arkv_fx.kernels import usable
from arkv_fx.models import PACKAGED

NAME = "arkv-fx"


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Versions, devices, the compiler that Inductor needs, kernels (the first is taken), extras."""
    found = examine()
    if json:
        print(json_.dumps(found))
        return
    compiler = found["compiler"] or "none: compile='inductor' needs one on a CPU; use 'eager'"
    general = [{"what": "arkv_fx", "found": found["arkv_fx"]}]
    general += [{"what": "python", "found": found["python"]}]
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
    models = [
        {"model": name, "weights": found["packages"][packaged.distribution] or packaged.install}
        for name, packaged in PACKAGED.items()
    ]
    out.print(table("Packaged models", models))


def examine() -> dict[str, Any]:
    """JSON-ready facts: versions, devices, compiler (path or None), kernels, missing packages.

    Needs and extras are those of the package's own metadata; a source tree that is not installed
    has none, and nothing is said of them.
    """
    lines, names = _declared()
    extras = {name: needs(lines, name) for name in names}
    wanted = ["torch", *needs(lines), *chain.from_iterable(extras.values())]
    wanted += [packaged.distribution for packaged in PACKAGED.values()]
    versions = {name: _version(name) for name in dict.fromkeys(wanted)}
    return {
        "arkv_fx": arkv_fx.__version__,
        "python": platform.python_version(),
        "packages": versions,
        "devices": _devices(),
        "compiler": _compiler(),
        "kernels": {
            name: usable(torch.device(name))
            for name in ("cpu", *["cuda"] * torch.cuda.is_available())
        },
        "missing": {
            extra: [name for name in packages if versions[name] is None]
            for extra, packages in extras.items()
        },
    }


def needs(lines: Sequence[str], extra: str = "") -> list[str]:
    """Packages that an extra brings here (without one: that the package itself needs).

    ``lines`` are the requirements in a package's metadata, those of extras marked with
    ``extra == "..."``; an extra may ask for others of the same package.
    """
    found: list[str] = []
    for requirement in map(Requirement, lines):
        if not _asked(requirement, extra) or (extra and _asked(requirement, "")):
            continue
        if canonicalize_name(requirement.name) == NAME:
            for other in sorted(requirement.extras):
                found += needs(lines, other)
        else:
            found.append(requirement.name)
    return list(dict.fromkeys(found))


def _asked(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _declared() -> tuple[list[str], list[str]]:
    """The requirements and the extras of the installed package."""
    try:
        return requires(NAME) or [], metadata(NAME).get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return [], []


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
