"""``arkv export``: a model with its small cache as graphs that run without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from arkv_fx.commands.common import (
    Budget,
    CalibrationFile,
    Compression,
    Context,
    DType,
    DTypeOption,
    Preset,
    configure,
    load,
    load_calibration,
    new_folder,
    spinner,
)
from arkv_fx.commands.console import err, out
from arkv_fx.exporting import TARGETS
from arkv_fx.exporting import export as export_
from arkv_fx.models import PACKAGED


def export(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(PACKAGED)}, a transformers id or a local folder.")
    ],
    folder: Annotated[
        Path, typer.Option("--out", callback=new_folder, help="A new or empty folder.")
    ],
    target: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")] = "onnx",
    compression: Compression = None,
    context: Context = None,
    budget: Budget = None,
    preset: Preset = "default",
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Storage format, most precise first; once or twice (the preset's)."),
    ] = None,
    calibration: CalibrationFile = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that run together.")] = 1,
    dtype: DTypeOption = DType.float32,
    capability: Annotated[
        list[str] | None,
        typer.Option(help="With --target tensorrt: a compute capability, as SM89. Repeatable."),
    ] = None,
    graph: Annotated[
        list[str] | None,
        typer.Option(help="With --target tensorrt: a graph that gets an engine. Repeatable."),
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            help="With tensorrt and torch_tensorrt: tokens of the longest prompt; the context."
        ),
    ] = None,
) -> None:
    """Write prefill and decode graphs, their weights, the tokenizer and arkv.json."""
    network, tokenizer = load(model, dtype)
    config = configure(preset, compression, budget, context or 4096)
    if tier:
        config = config.replace(tiers=tuple(tier))
    given = {"capabilities": capability, "graphs": graph, "longest": longest}
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    with spinner() as show:
        export_(
            network, load_calibration(calibration), folder, target, config=config, batch=batch,
            tokenizer=tokenizer, progress=show, **options,
        )  # fmt: skip
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for path in files:
        out.print(f"{path.stat().st_size / 2**20:9.2f} MiB  {path.name}", highlight=False)
    err.print(f"arkv generate --engine {folder} --prompt-file ...", highlight=False)
