"""Matplotlib where it is installed, drawing into files."""

from __future__ import annotations

from typing import Any

from arkv_fx.errors import ArkvError


def pyplot(error: type[ArkvError]) -> Any:
    """``matplotlib.pyplot`` without a display; raises ``error`` if it is not installed."""
    try:
        import matplotlib
    except ImportError as missing:
        raise error("plots need matplotlib: pip install 'arkv-fx[plot]'") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
