"""Matplotlib where it is installed, drawing into files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arkv_fx.calibration import Calibration
from arkv_fx.errors import ArkvError, CalibrationError


def pyplot_of(error: type[ArkvError]) -> Any:
    """``matplotlib.pyplot`` without a display; raises ``error`` if it is not installed."""
    try:
        import matplotlib
    except ImportError as missing:
        raise error("plots need matplotlib: pip install 'arkv-fx[plot]'") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_calibration(calibration: Calibration, path: str | Path) -> None:
    """Draw statistics, OQ ratios, shares and divergences by layer into an image file.

    Raises:
        CalibrationError: if matplotlib is not installed.
    """
    pyplot = pyplot_of(CalibrationError)
    layers = [row.layer for row in calibration.layers]
    titles = {
        "entropy": "entropy", "variance": "variance", "kurtosis": "kurtosis",
        "oq_ratio": "OQ ratio", "share": "share of the budget",
        "divergence": "error" if calibration.mode == "output" else "KL of this layer alone",
    }  # fmt: skip
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        heights = [getattr(row, name) or 0.0 for row in calibration.layers]  # None: not measured
        axis.bar(layers, heights, color="tab:blue")
        axis.set_title(title)
        axis.set_xlabel("layer")
    figure.suptitle(f"{calibration.fingerprint}, {calibration.mode}, prompts {calibration.samples}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
