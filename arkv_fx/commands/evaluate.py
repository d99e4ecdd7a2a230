"""``arkv eval``: a compressed cache against the full one."""

from __future__ import annotations

from typing import Annotated

import typer

from arkv_fx.commands.common import (
    CalibrationFile,
    Device,
    DType,
    DTypeOption,
    JsonFile,
    Lowering,
    Model,
    load,
    load_calibration,
    spinner,
    tokens_of,
)
from arkv_fx.commands.console import out
from arkv_fx.evaluation import fidelity as fidelity_
from arkv_fx.evaluation import passkey as passkey_
from arkv_fx.evaluation import results as results_
from arkv_fx.evaluation.methods import METHODS

app = typer.Typer(
    help="Measure what compression costs.", no_args_is_help=True, add_completion=False
)

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help=f"One of {', '.join(METHODS)}; options may follow, as in "
        "default:tiers=int8+int4,oq_ratio=0.2,score.decay=0.95. May be repeated.",
    ),
]
Compile = Annotated[Lowering, typer.Option("--compile", help="How the rewritten graphs run.")]


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
        list[float] | None,
        typer.Option(min=1, help="Times fewer bytes than bf16 (4). May be repeated."),
    ] = None,
    method: Methods = None,
    calibration: CalibrationFile = None,
    dtype: DTypeOption = DType.float32,
    device: Device = "cpu",
    compile: Compile = Lowering.eager,
    json: JsonFile = None,
) -> None:
    """Divergence from the full cache's predictions, on real text, step by step."""
    network, tokenizer = load(model, dtype, device)
    with spinner() as progress:
        found = fidelity_.fidelity(
            network,
            tokens_of(tokenizer, text),
            context=context,
            steps=steps,
            compressions=compression or [4.0],
            methods=method or fidelity_.DEFAULT_METHODS,
            calibration=load_calibration(calibration),
            name=model,
            compile=compile,
            progress=progress,
        )
    shown = fidelity_.means(found) if text is None or len(text) > 1 else found
    out.print(results_.table("Fidelity to the full cache (full_bytes: of bf16)", shown))
    if json:
        results_.write(json, found)


@app.command()
def passkey(
    model: Model = "smollm2",
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Prompt tokens (2048 and 4096). May be repeated."),
    ] = None,
    method: Methods = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per row.")] = 20,
    compression: Annotated[float, typer.Option(min=1, help="Times fewer bytes than bf16.")] = 4.0,
    filler: Annotated[
        list[str] | None, typer.Option(help="repeated or prose (both). May be repeated.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts that run at a time.")] = 5,
    keys: Annotated[int, typer.Option(min=1, help="Pass keys in a text; one is asked for.")] = 1,
    after: Annotated[
        bool, typer.Option("--after", help="Ask when the text is in the cache already.")
    ] = False,
    calibration: CalibrationFile = None,
    dtype: DTypeOption = DType.float32,
    device: Device = "cpu",
    compile: Compile = Lowering.eager,
    json: JsonFile = None,
) -> None:
    """Retrieval of five digits hidden in a long text, asked for at its end."""
    network, tokenizer = load(model, dtype, device)
    with spinner() as progress:
        found = passkey_.passkey(
            network,
            tokenizer,
            contexts=context or (2048, 4096),
            methods=method or passkey_.DEFAULT_METHODS,
            prompts=prompts,
            compression=compression,
            fillers=filler or passkey_.FILLERS,
            calibration=load_calibration(calibration),
            batch=batch,
            keys=keys,
            after=after,
            name=model,
            compile=compile,
            progress=progress,
        )
    out.print(results_.table("Passkey retrieval", found))
    if json:
        results_.write(json, found)
