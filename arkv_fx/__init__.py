"""A small KV cache for any PyTorch language model, without changing the model."""

from __future__ import annotations

from pathlib import Path

# The folder passes/ lies at the top of the repository and is installed as arkv_fx.passes. With
# the repository root on sys.path before an installed copy, Python finds this folder first.
if not (Path(__file__).parent / "passes").exists():
    __path__.append(str(Path(__file__).parent.parent))

from arkv_fx.cache import ArkvCache
from arkv_fx.calibrate import calibrate
from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig, preset
from arkv_fx.transform import restore, transform

__all__ = [
    "ArkvCache",
    "ArkvConfig",
    "Calibration",
    "calibrate",
    "preset",
    "restore",
    "transform",
]
__version__ = "0.1.0"
