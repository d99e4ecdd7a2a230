"""A small KV cache for any PyTorch language model, without changing the model.

Names are imported when they are first used: ``arkv_fx.runtime`` works where there is no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The folder passes/ lies at the top of the repository and is installed as arkv_fx.passes. With
# the repository root on sys.path before an installed copy, Python finds this folder first.
if not (Path(__file__).parent / "passes").exists():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from arkv_fx import errors
    from arkv_fx.calibrating import calibrate
    from arkv_fx.calibration import Calibration
    from arkv_fx.config import ArkvConfig, preset
    from arkv_fx.exporting import export
    from arkv_fx.huggingface.cache import ArkvCache
    from arkv_fx.transforming import restore, transform

__all__ = [
    "ArkvCache",
    "ArkvConfig",
    "Calibration",
    "calibrate",
    "errors",
    "export",
    "preset",
    "restore",
    "transform",
]
__version__ = "0.1.0"

# The module of each name; no module has the name of a function, which importing it would hide.
_HOMES = {
    "ArkvCache": "huggingface.cache",
    "ArkvConfig": "config",
    "Calibration": "calibration",
    "calibrate": "calibrating",
    "export": "exporting",
    "preset": "config",
    "restore": "transforming",
    "transform": "transforming",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("arkv_fx.errors")  # which makes it an attribute here
    if name not in _HOMES:
        raise AttributeError(f"module 'arkv_fx' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"arkv_fx.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
