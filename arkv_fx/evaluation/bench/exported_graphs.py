"""``export``: what exporting takes and writes, and decode steps of ONNX Runtime against torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from arkv_fx.config import ArkvConfig
from arkv_fx.evaluation.bench.caches import arkv_decoder, layers_of, load_model
from arkv_fx.evaluation.bench.cases import Options
from arkv_fx.evaluation.bench.contest import Entrant, compete
from arkv_fx.evaluation.bench.measurements import Measurement, dtype_name
from arkv_fx.exporting import export
from arkv_fx.runtime import OnnxSession

SLOTS, PROMPT = 256, 512
CAPABILITY = "SM89"


def export_(options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    """One export with its engines, where TensorRT is installed, and decode steps of what it wrote.

    All methods hold the same formats and slots. Engines are built, not run.
    """
    model = load_model(options)
    config = options.config(SLOTS)
    empty = Measurement("export", options.model, "", dtype_name(options.dtype), slots=config.budget)
    target: str = "onnx"
    given: dict[str, Any] = {}
    if find_spec("tensorrt_rtx") is not None:
        target, given = "tensorrt", {"capabilities": [CAPABILITY]}
    with TemporaryDirectory() as out:
        began = perf_counter()
        folder = export(
            model, None, Path(out) / "e", target, config=config, progress=progress, **given
        )
        seconds = perf_counter() - began
        rows = _files(folder, seconds, empty)
        return rows + _steps(model, folder, config, options, empty, progress)


def _files(folder: Path, seconds: float, empty: Measurement) -> list[Measurement]:
    """What was written: graphs with their weights, and each engine."""
    found: list[dict[str, Any]] = json.loads((folder / "arkv.json").read_text()).get("engines", [])
    built = {engine["file"] for engine in found}
    size = sum(p.stat().st_size for p in folder.iterdir() if p.name not in built)
    rest = seconds - sum(engine["seconds"] for engine in found)
    rows = [replace(empty, method="export to ONNX", median_us=rest * 1e6, bytes=size)]
    for engine in found:
        name = f"engine {engine['graph']} {engine['capability']}"
        micros = engine["seconds"] * 1e6
        rows.append(replace(empty, method=name, median_us=micros, bytes=engine["bytes"]))
    if not found:
        note = "not available: tensorrt_rtx is not installed"
        rows.append(replace(empty, method="engines", note=note))
    return rows


def _steps(
    model: PreTrainedModel, folder: Path, config: ArkvConfig, options: Options, empty: Measurement,
    progress: Callable[[str], None],
) -> list[Measurement]:  # fmt: skip
    """Decode steps over a full state."""
    token = torch.zeros(1, 1, dtype=torch.long, device=options.device)
    session = OnnxSession(folder, threads=options.threads)
    session.prefill(torch.randint(0, session.sidecar.vocabulary, (1, PROMPT)).numpy())
    row = replace(empty, method="onnxruntime", bytes=session.nbytes)
    entrants = [Entrant(row, partial(session.step, token.cpu().numpy()))]
    layers = layers_of(model)
    for lowering in dict.fromkeys(("eager", *options.lowerings)):
        progress(f"{options.model}: arkv-{lowering}")
        decoder = arkv_decoder(model, layers, PROMPT, lowering, options, config)
        row = replace(empty, method=f"arkv-{lowering}", bytes=decoder.nbytes())
        entrants.append(Entrant(row, partial(decoder.step, token)))
    rows = compete(entrants, options, progress, options.steps)
    torch_rows = [r for r in rows if r.method.startswith("arkv")]
    return [rows[0].against(torch_rows), *(r.against(rows[:1]) for r in rows[1:])]
