"""A small KV cache for any PyTorch language model, without changing the model.

Names are imported when they are first used: ``arkv_fx.runtime`` works where there is no torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

# The folder passes/ lies at the top of the repository and is installed as arkv_fx.passes. With
# the repository root on sys.path before an installed copy, Python finds this folder first.
if not (Path(__file__).parent / "passes").exists():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from arkv_fx.cache import ArkvCache
    from arkv_fx.calibrate import calibrate
    from arkv_fx.calibration import Calibration
    from arkv_fx.config import ArkvConfig, preset
    from arkv_fx.export import export
    from arkv_fx.transform import restore, transform

__all__ = [
    "ArkvCache",
    "ArkvConfig",
    "Calibration",
    "calibrate",
    "export",
    "preset",
    "restore",
    "transform",
]
__version__ = "0.1.0"

_HOMES = {
    "ArkvCache": "cache",
    "ArkvConfig": "config",
    "Calibration": "calibration",
    "calibrate": "calibrate",
    "export": "export",
    "preset": "config",
    "restore": "transform",
    "transform": "transform",
}


class _Package(ModuleType):
    """The package itself: some functions are called as the modules that they are in."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):  # importing sets submodules
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'arkv_fx' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"arkv_fx.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
