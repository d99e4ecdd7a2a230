"""``arkv calibrate`` and ``arkv report``: look into a model before it is used."""

from __future__ import annotations

import json as json_
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from arkv_fx.calibrating import calibrate as calibrate_
from arkv_fx.calibration import MODES
from arkv_fx.commands.common import (
    Budget,
    CalibrationFile,
    Compression,
    Context,
    Device,
    DType,
    DTypeOption,
    Model,
    Preset,
    configure,
    load,
    load_calibration,
    spinner,
    tokens_of,
    writable,
)
from arkv_fx.commands.console import out
from arkv_fx.config import ArkvConfig
from arkv_fx.config import preset as preset_
from arkv_fx.evaluation.plots import plot_calibration
from arkv_fx.evaluation.results import table
from arkv_fx.huggingface.transformed import Transformed
from arkv_fx.models import PACKAGED, skeleton
from arkv_fx.transforming import transform

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def calibrate(
    model: Model = "smollm2",
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file, or the name of a text that is shipped (esther). Repeatable."),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens read of every text.")] = 4096,
    compression: Annotated[
        float, typer.Option(min=1, help="Times fewer bytes than bf16, at the length read.")
    ] = 4.0,
    preset: Preset = "default",
    mode: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(MODES)} (what the preset says).")
    ] = None,
    calibration_file: Annotated[
        Path | None,
        typer.Option("--out", callback=writable, help="Where the calibration is saved."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=writable, help="An image file to draw it into.")
    ] = None,
    dtype: DTypeOption = DType.float32,
    device: Device = "cpu",
    json: AsJson = False,
) -> None:
    """Try budgets on each layer, on sample texts: its OQ ratio and its share of the budget."""
    config = preset_(preset, **({} if mode is None else {"calibration": mode}))
    network, tokenizer = load(model, dtype, device)
    if config.calibration in ("output", "measured"):
        config = config.replace(compression=compression)
        if network.dtype == torch.float32:
            # As in `arkv eval`: a float32 model on a CPU stands for its bf16 twin, and so do bytes.
            config = config.replace(compression=2 * compression, window_format="bf16")
    samples = [
        ids[None, :context].to(network.device)
        for ids in tokens_of(tokenizer, text or ["esther"]).values()
    ]
    with spinner() as progress:
        calibration = calibrate_(network, samples, config, progress=progress)
    if json:
        print(json_.dumps(asdict(calibration)))
    else:
        rows = [asdict(replace(row, costs=())) for row in calibration.layers]
        for row in rows:
            del row["costs"]
        out.print(table(f"{calibration.fingerprint}, {calibration.mode}", rows))
    if calibration_file:
        calibration.save(calibration_file)
    if plot:
        plot_calibration(calibration, plot)


def report(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(PACKAGED)}, a transformers id or a local folder.")
    ],
    compression: Compression = None,
    context: Context = None,
    budget: Budget = None,
    preset: Preset = "default",
    calibration: CalibrationFile = None,
    dtype: Annotated[
        DType | None, typer.Option(help="The dtype of the cache (that of the checkpoint).")
    ] = None,
    json: AsJson = False,
) -> None:
    """Will it work on my model, and what will I save? Every attention, rewritten or why not.

    Reads the model's configuration; its weights only with --calibration, which belongs to them.
    """
    config = configure(preset, compression, budget, context or ArkvConfig.context)
    if calibration:
        network, _ = load(model, dtype or DType.float32)
    else:
        network = skeleton(model, getattr(torch, dtype) if dtype else None)
    transform(network, config, load_calibration(calibration), compile="eager")
    transformed: Transformed = network.arkv  # type: ignore[assignment]
    found = transformed.report()
    if json:
        total = {
            "context": found.context,
            "bytes": found.nbytes,
            "full_bytes": found.full_nbytes,
            "full_bytes_16bit": found.half_nbytes,
            "notes": found.notes,
        }
        print(json_.dumps({**total, "sites": found.rows}))
    else:
        out.print(str(found), markup=False, highlight=False, soft_wrap=True)
