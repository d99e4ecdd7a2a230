"""``arkv eval``: a compressed cache against the full one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arkv_fx.commands.common import (
    CalibrationFile,
    Device,
    DType,
    DTypeOption,
    JsonFile,
    Model,
    load,
    load_calibration,
    out,
    read_text,
    spinner,
)
from arkv_fx.evaluation import fidelity as fidelity_
from arkv_fx.evaluation import rows as rows_
from arkv_fx.evaluation import texts
from arkv_fx.evaluation.methods import METHODS

app = typer.Typer(help="Measure what compression costs.", no_args_is_help=True)

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help=f"One of {', '.join(METHODS)}; options may follow, as in "
        "default:tiers=int8+int4,oq_ratio=0.2,score.decay=0.95. May be repeated.",
    ),
]


@app.command()
def fidelity(
    model: Model = "smollm2",
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file, or the name of a text that is shipped. May be repeated."),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Teacher-forced tokens after it.")] = 128,
    compression: Annotated[
        list[float] | None, typer.Option(help="Times fewer bytes than bf16. May be repeated.")
    ] = None,
    method: Methods = None,
    calibration: CalibrationFile = None,
    dtype: DTypeOption = DType.float32,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Divergence from the full cache's predictions, on real text, step by step."""
    network, tokenizer = load(model, dtype, device)
    with spinner() as progress:
        found = fidelity_.fidelity(
            network,
            {
                name: tokenizer(content, return_tensors="pt", verbose=False).input_ids[0]
                for name, content in _texts(text).items()
            },
            context=context,
            steps=steps,
            compressions=compression or [4.0],
            methods=method or fidelity_.DEFAULT_METHODS,
            calibration=load_calibration(calibration),
            name=model,
            progress=progress,
        )
    if json:
        rows_.write(json, found)
    shown = fidelity_.means(found) if text is None or len(text) > 1 else found
    out.print(rows_.table("Fidelity to the full cache", shown))


def _texts(chosen: list[str] | None) -> dict[str, str]:
    """Contents by name: files where they exist, else the texts that are shipped."""
    return {
        Path(name).stem: read_text(Path(name)) if Path(name).is_file() else texts.read(name)
        for name in chosen or texts.names()
    }
