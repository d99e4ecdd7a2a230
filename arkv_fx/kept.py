"""Calibrations that are kept for the next process, in the cache folder (``ARKV_CACHE``).

A file is of a model's weights and of all options but the budget, for which it is solved again.
Those of ``SHIPPED``, which come with the package, are found like those of one's own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from arkv_fx.calibration import SCHEMA_VERSION, Calibration, fingerprint
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import CalibrationError
from arkv_fx.files import cache_folder
from arkv_fx.logs import get_logger

log = get_logger("calibration")
SHIPPED = Path(__file__).parent / "shipped"
SIZES = ("compression", "context", "budget", "bytes")


def find(model: nn.Module, config: ArkvConfig) -> Calibration | None:
    """The calibration that was kept for these weights and options, if there is one; says so.

    Weights are read only where there is one of a model of the same shapes.
    """
    if any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters()):
        return None
    kind = _kind(model, config)
    there = [path for folder in (_folder(), SHIPPED) for path in folder.glob(f"{kind}-*.json")]
    if not there:
        return None
    whose = fingerprint(model)
    path = next((path for path in there if path.name == f"{kind}-{whose}.json"), None)
    if path is None:
        return None
    try:
        found = Calibration.load(path)
        found.check(whose)
    except CalibrationError as error:
        log.warning("a kept calibration is left out, delete it: %s", error)
        return None
    log.info("calibrated on %s tokens, from %s", "+".join(map(str, found.samples)), path)
    return found


def keep(calibration: Calibration, model: nn.Module, config: ArkvConfig) -> Path | None:
    """Keep a calibration of ``model`` under ``config``: its file, None if it cannot be written."""
    path = _folder() / f"{_kind(model, config)}-{calibration.fingerprint}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(path)
    except OSError as error:
        log.warning(
            "the calibration cannot be kept in %s (%s): set ARKV_CACHE to a folder that can be "
            "written, or save it with Calibration.save",
            path.parent, error,
        )  # fmt: skip
        return None
    log.info("the calibration is kept in %s", path)
    return path


def options_of(config: ArkvConfig) -> dict[str, Any]:
    """The options that a calibration hangs on: one by "output" is solved for any budget."""
    options = config.to_dict()
    if config.calibration == "output":
        options = {name: value for name, value in options.items() if name not in SIZES}
        options["unit"] = "bytes" if config.budget is None else "tokens"
    return options


def _folder() -> Path:
    return cache_folder() / "calibrations"


def _kind(model: nn.Module, config: ArkvConfig) -> str:
    """A digest of what can be told without reading weights: their shapes, and the options."""
    options = options_of(config)
    shapes = sorted((name, tuple(p.shape)) for name, p in model.named_parameters())
    text = json.dumps([SCHEMA_VERSION, options, type(model).__name__, shapes])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
