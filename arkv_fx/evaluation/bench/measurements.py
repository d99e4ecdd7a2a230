"""One method's result in one case, the ratios between results, and the conditions of a run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from arkv_fx.config import ArkvConfig
from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.bench.cases import Options
from arkv_fx.evaluation.bench.timing import Timing, cache_bytes
from arkv_fx.evaluation.plots import pyplot_of
from arkv_fx.evaluation.results import Row, table
from arkv_fx.files import write_text


@dataclass(frozen=True)
class Measurement:
    """One row; what does not apply is None.

    Args:
        context: tokens that a full cache holds, or that come at once.
        slots: tokens that a compressed cache holds per kv head.
        median_us, low_us, high_us: microseconds of one call, median and quartiles.
        tokens_per_s: of a whole model, from the median step.
        cpu_s: CPU-seconds of this process and its children, compilers included.
        bytes: what the method reads as cache, all sequences of the batch.
        ratio_to: how many times as fast as each named baseline: the quotient of the medians.
        note: why there is no result, or what to know about it.
    """

    section: str
    case: str
    method: str
    dtype: str = ""
    slots: int | None = None
    context: int | None = None
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    tokens_per_s: float | None = None
    cpu_s: float | None = None
    bytes: int | None = None
    ratio_to: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None

    def timed(self, timing: Timing) -> Measurement:
        """The same with what was measured, given in seconds."""
        median, low, high = (t * 1e6 for t in (timing.median, timing.low, timing.high))
        return replace(self, median_us=median, low_us=low, high_us=high)

    def against(self, baselines: Sequence[Measurement]) -> Measurement:
        """The same with ``ratio_to`` those baselines that have a result."""
        mine = self._cost()
        if mine is None:
            return self
        ratios = {b.label: cost / mine for b in baselines if (cost := b._cost()) is not None}
        return replace(self, ratio_to={**self.ratio_to, **ratios})

    @property
    def label(self) -> str:
        """The method, with the length of the cache where it matters."""
        return self.method if self.context is None else f"{self.method}@{self.context}"

    def _cost(self) -> float | None:
        return self.median_us if self.median_us is not None else self.cpu_s


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` and so on."""
    return str(dtype).removeprefix("torch.")


def conditions(options: Options) -> dict[str, Any]:
    """What all rows of a run have in common."""
    cuda = options.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(options.device) if cuda else str(options.device),
        "cpu": _cpu_name(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": options.threads,
        "cache_bytes": cache_bytes(options.device),
        "dtype": dtype_name(options.dtype),
        "tiers": options.tiers or ArkvConfig().tiers,
        "batch": options.batch,
        "rounds": options.rounds,
        "steps": options.steps,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(path: Path, found: Mapping[str, Any], rows: Sequence[Measurement]) -> None:
    """Write ``{"conditions": {...}, "rows": [...]}``."""
    data = {"conditions": dict(found), "rows": [asdict(row) for row in rows]}
    write_text(path, json.dumps(data, indent=1) + "\n")


def tables(rows: Sequence[Measurement]) -> list[Table | str]:
    """Per section and case: the results, how many times as fast as its baselines each is, notes."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        groups.setdefault((row.section, row.case), []).append(row)
    out: list[Table | str] = []
    for (section, case), group in groups.items():
        out.append(table(f"{section}, {case}", _without_empty([_plain(row) for row in group])))
        names = dict.fromkeys(name for row in group for name in row.ratio_to)
        compared = [row for row in group if row.ratio_to]
        ratios: list[Row] = [
            {"baseline": name, **{row.label: row.ratio_to.get(name) for row in compared}}
            for name in names
        ]
        if ratios:
            out.append(table("times as fast as", ratios))
        out += [f"{row.label}: {row.note}" for row in group if row.note]
    return out


def _plain(row: Measurement) -> Row:
    """For the terminal: the label instead of method and context, whole microseconds."""
    quartiles = None
    if row.low_us is not None and row.high_us is not None:
        quartiles = f"{row.low_us:.0f}-{row.high_us:.0f}"
    return {
        "method": row.label,
        "dtype": row.dtype,
        "slots": row.slots,
        "median_us": None if row.median_us is None else round(row.median_us),
        "quartiles": quartiles,
        "tokens_per_s": row.tokens_per_s,
        "cpu_s": row.cpu_s,
        "bytes": row.bytes,
    }


def _without_empty(rows: list[Row]) -> list[Row]:
    used = [name for name in rows[0] if any(row[name] not in (None, "") for row in rows)]
    return [{name: row[name] for name in used} for row in rows]


def plot(rows: Sequence[Measurement], path: str | Path) -> None:
    """Draw one panel of bars per section and case into an image file.

    Raises:
        EvaluationError: if matplotlib is not installed.
    """
    pyplot = pyplot_of(EvaluationError)
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        for name, unit in (("tokens_per_s", "tokens/s"), ("cpu_s", "CPU s"), ("median_us", "µs")):
            if (value := getattr(row, name)) is not None:
                title = f"{row.section}, {row.case} ({unit})"
                groups.setdefault(title, []).append((row.label, value))
                break
    height = 1 + sum(1 + 0.3 * len(bars) for bars in groups.values())
    figure, axes = pyplot.subplots(
        max(1, len(groups)), 1, figsize=(9, height), squeeze=False, layout="constrained",
        height_ratios=[2 + len(bars) for bars in groups.values()] or None,
    )  # fmt: skip
    for axis, (title, bars) in zip(axes.flat, groups.items(), strict=False):
        names = [name for name, _ in bars]
        axis.barh(range(len(bars)), [value for _, value in bars])
        axis.set_yticks(range(len(bars)), names)
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_title(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
