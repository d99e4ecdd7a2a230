"""Pictures as plotly takes them: quality against bytes, memory against context, layers.

What the page's own script adds is its colours; here are the numbers and what is said of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import cycle
from math import ceil, floor, isfinite, log10
from typing import Any

from arkv_fx.calibration import Calibration
from arkv_fx.evaluation.pages.front import front
from arkv_fx.evaluation.pages.looks import Look
from arkv_fx.evaluation.results import Row

MIB = 2**20
PLACES = ("bottom center", "top center", "middle right", "middle left")
"""Of a point's compression, another for each method: some take the same bytes."""
FLOOR = 1e-5
"""The least divergence that a logarithmic axis shows."""


@dataclass(frozen=True)
class Metric:
    """A measured quality: its key in the rows, its name, and which way is better.

    ``share``: it lies between 0 and 1, and all of that is shown.
    """

    key: str
    title: str
    higher: bool
    log: bool = False
    share: bool = False


METRICS = {
    "tasks": (
        Metric("accuracy", "accuracy", True, share=True),
        Metric("agreement", "agreement with the full cache", True, share=True),
    ),
    "fidelity": (
        Metric("kl_mean", "KL(full ‖ method), nats", False, log=True),
        Metric("top1", "same top token", True),
        Metric("ppl_ratio", "perplexity ratio", False),
    ),
}


@dataclass
class Picture:
    """A figure: ``variants`` are plotly's data and layout by metric, and what is ``said`` of it
    (for who does not see it, too); ``number`` its place among all of the page.
    """

    title: str
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    number: int = 0

    @property
    def said(self) -> str:
        """Of the variant that is shown first."""
        return str(next(iter(self.variants.values()))["said"])


def named(row: Row) -> str:
    """A method at its compression, as a person says it."""
    size = row["compression"]
    return str(row["method"]) if size is None else f"{row['method']} {size:g}x"


def on_front(rows: Sequence[Row], metric: Metric) -> list[Row]:
    """Those of the rows that nobody beats, the smallest first; without a number none is."""
    good = [row for row in rows if isfinite(row[metric.key])]
    points = [(float(row["bytes"]), float(row[metric.key])) for row in good]
    return [good[i] for i in front(points, higher=metric.higher)]


def quality(
    title: str, rows: Sequence[Row], metrics: Sequence[Metric], styles: Mapping[str, Look]
) -> Picture:
    """Every row a point, bytes to the right, with the front as steps: what so many bytes give."""
    picture = Picture(title)
    for metric in metrics:
        traces = [
            _points(style, [r for r in rows if r["method"] == style.method], metric, place)
            for style, place in zip(styles.values(), cycle(PLACES), strict=False)
            if any(r["method"] == style.method for r in rows)
        ]
        drawn = on_front(rows, metric)
        # Steps: with so many bytes one has the best that fewer of them give.
        line = {
            "x": [row["bytes"] / MIB for row in drawn],
            "y": [_height(row, metric) for row in drawn],
            "type": "scatter", "mode": "lines", "line": {"shape": "hv", "width": 2, "dash": "dot"},
            "hoverinfo": "skip", "name": "front", "meta": "front",
        }  # fmt: skip
        axis: dict[str, Any] = {"title": {"text": metric.title}}
        if metric.log:
            axis |= {"type": "log", "exponentformat": "power"}
        elif metric.share:
            axis["range"] = [-0.05, 1.08]
        layout: dict[str, Any] = {
            "xaxis": _sizes([row["bytes"] / MIB for row in rows]), "yaxis": axis,
        }  # fmt: skip
        if (full := rows[0].get("full_accuracy")) is not None and metric.key == "accuracy":
            layout["shapes"] = [_level(full)]
            layout["annotations"] = [_label(full)]
        picture.variants[metric.key] = {
            "data": [line, *traces], "layout": layout, "said": _said(rows, drawn, metric),
        }  # fmt: skip
    return picture


def _said(rows: Sequence[Row], best: Sequence[Row], metric: Metric) -> str:
    names = ", ".join(named(row) for row in best)
    said = [f"{len(rows)} points; beaten by none in {metric.title}: {names or 'nobody'}."]
    missing = [named(row) for row in rows if not isfinite(row[metric.key])]
    if missing:
        said.append(f"It is no number of {', '.join(missing)}, which are not drawn.")
    if metric.log and any(row[metric.key] < FLOOR for row in rows):
        said.append(f"Below {FLOOR:g} it is drawn at {FLOOR:g}.")
    return " ".join(said)


def _sizes(sizes: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis of MiB with whole numbers at it: plotly's own shows single digits."""
    powers = range(floor(log10(min(sizes))) - 1, ceil(log10(max(sizes))) + 2)
    few = (1,) if max(sizes) > 300 * min(sizes) else (1, 2, 5)
    ticks = [digit * 10.0**power for power in powers for digit in few]
    return {
        "title": {"text": "MiB"}, "type": "log", "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }  # fmt: skip


def _points(style: Look, rows: Sequence[Row], metric: Metric, place: str) -> dict[str, Any]:
    drawn = [row for row in rows if isfinite(row[metric.key])]
    text = [
        f"<b>{escape(named(row))}</b><br>{row['bytes'] / MIB:.3g} MiB, "
        f"{row['bytes'] / row['full_bytes']:.3f} of a full bf16 cache<br>"
        f"{metric.title}: {row[metric.key]:.4g}"
        + (f"<br>calibration: {escape(str(row['calibration']))}" if "calibration" in row else "")
        for row in drawn
    ]
    return {
        "x": [row["bytes"] / MIB for row in drawn], "y": [_height(row, metric) for row in drawn],
        "type": "scatter", "mode": "markers+text", "name": escape(style.method),
        "text": ["" if r["compression"] is None else f"{r['compression']:g}x" for r in drawn],
        "textposition": place, "textfont": {"size": 10},
        "hovertext": text, "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 11},
    }  # fmt: skip


def _height(row: Row, metric: Metric) -> float:
    value = float(row[metric.key])
    return max(value, FLOOR) if metric.log else value


def _level(height: float) -> dict[str, Any]:
    return {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height,
        "line": {"width": 1, "dash": "dash"},
    }  # fmt: skip


def _label(height: float) -> dict[str, Any]:
    return {
        "xref": "paper", "x": 0, "y": height, "text": "full cache", "showarrow": False,
        "xanchor": "left", "yanchor": "bottom", "font": {"size": 10},
    }  # fmt: skip


def memory(
    title: str, rows: Sequence[Row], length: str, styles: Mapping[str, Look]
) -> Picture | None:
    """Bytes of every method, and of a full bf16 cache, by context; None if there is one length.

    Args:
        length: the key of the rows that says how many tokens.
    """
    lengths = sorted({row[length] for row in rows})
    if len(lengths) < 2:
        return None
    most: dict[tuple[str, float | None], dict[int, int]] = {}
    full: dict[int, int] = {}
    for row in rows:
        sizes = most.setdefault((row["method"], row["compression"]), {})
        sizes[row[length]] = max(row["bytes"], sizes.get(row[length], 0))
        full[row[length]] = row["full_bytes"]
    traces = [_line("full bf16 cache", full, None)]
    for (method, size), sizes in most.items():
        name = named({"method": method, "compression": size})
        traces.append(_line(name, sizes, styles[method]))
    layout = {
        "xaxis": {
            "title": {"text": "tokens"}, "type": "log", "tickvals": lengths,
            "ticktext": [str(tokens) for tokens in lengths],
        },
        "yaxis": _sizes([size / MIB for each in (full, *most.values()) for size in each.values()]),
    }  # fmt: skip
    said = f"Bytes of {len(traces) - 1} methods at {', '.join(map(str, lengths))} tokens."
    return Picture(title, {"": {"data": traces, "layout": layout, "said": said}})


def _line(name: str, sizes: Mapping[int, int], style: Look | None) -> dict[str, Any]:
    lengths = sorted(sizes)
    trace: dict[str, Any] = {
        "x": lengths, "y": [sizes[n] / MIB for n in lengths], "type": "scatter",
        "mode": "lines+markers", "name": escape(name), "meta": "full" if style is None else "",
        "text": [f"<b>{escape(name)}</b><br>{n} tokens: {sizes[n] / MIB:.3g} MiB" for n in lengths],
        "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip
    if style is not None:
        trace["marker"] = {"color": style.colour, "symbol": style.symbol, "size": 9}
        trace["line"] = {"color": style.colour, "width": 1.5}
    return trace


def by_layer(calibration: Calibration) -> list[Picture]:
    """Shares of the budget and OQ ratios by layer."""
    layers = [row.layer for row in calibration.layers]
    wanted = {"share": ("share of the budget", 1.0), "oq_ratio": ("OQ ratio", None)}
    found = []
    for key, (title, mean) in wanted.items():
        heights = [float(getattr(row, key)) for row in calibration.layers]
        low, high = (layers[heights.index(f(heights))] for f in (min, max))
        said = f"From {min(heights):.3g} (layer {low}) to {max(heights):.3g} (layer {high})."
        data = {
            "x": layers, "y": heights, "type": "bar", "marker": {"color": "#0072B2"},
            "hovertemplate": "layer %{x}: %{y:.3f}<extra></extra>", "name": title,
        }  # fmt: skip
        layout: dict[str, Any] = {
            "xaxis": {"title": {"text": "layer"}}, "yaxis": {"title": {"text": title}}
        }  # fmt: skip
        if mean is not None:
            layout["shapes"] = [_level(mean)]
        found.append(Picture(title, {"": {"data": [data], "layout": layout, "said": said}}))
    return found
