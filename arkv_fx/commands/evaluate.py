"""``arkv eval``: a compressed cache against the full one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from arkv_fx import texts
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
    texts_of,
    tokens_of,
    with_digest,
    writable,
)
from arkv_fx.commands.console import out
from arkv_fx.commands.write_report import report
from arkv_fx.evaluation import fidelity as fidelity_
from arkv_fx.evaluation import passkey as passkey_
from arkv_fx.evaluation import results as results_
from arkv_fx.evaluation import task_runs
from arkv_fx.evaluation.methods import METHODS
from arkv_fx.evaluation.tasks import TASKS
from arkv_fx.evaluation.weight_error import weight_error

app = typer.Typer(
    help="Measure what compression costs.", no_args_is_help=True, add_completion=False
)
app.command()(report)

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
def weights(
    model: Model = "smollm2",
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file, or the name of a text that is shipped. May be repeated."),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 512,
    dtype: DTypeOption = DType.float32,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """What int8 and int4 weights cost: predictions against the originals', without a cache."""
    network, tokenizer = load(model, dtype, device)
    with spinner() as progress:
        found = weight_error(
            network, tokens_of(tokenizer, text), context=context, progress=progress
        )
    out.print(results_.table("Quantized weights against the model's own", found))
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


class Quick(NamedTuple):
    """What ``eval tasks`` does unless it is told: in full, and in a few minutes."""

    contexts: tuple[int, ...] = (1024, 4096)
    methods: tuple[str, ...] = fidelity_.DEFAULT_METHODS
    prompts: int = 20


QUICK = Quick((1024,), ("full", "evict", "default"), 2)


@app.command()
def tasks(
    model: Model = "smollm2",
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(TASKS)} (all). May be repeated."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A file, or a shipped text, to make documents of. May be repeated."),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of a document (1024 and 4096). May be repeated."),
    ] = None,
    method: Methods = None,
    compression: Annotated[
        list[float] | None,
        typer.Option(min=1, help="Times fewer bytes than bf16 (4). May be repeated."),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Documents per task and context (20).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn: names, numbers, places.")] = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="What is not given is small: one context of 1024, 3 methods, 2 prompts."
        ),
    ] = False,
    calibration: CalibrationFile = None,
    dtype: DTypeOption = DType.float32,
    device: Device = "cpu",
    compile: Compile = Lowering.eager,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", callback=writable,
            help="Add rows here as they come, a line of JSON each; those there already are kept.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Answers to questions about long documents, beside the full cache's; it can be resumed."""
    chosen = QUICK if quick else Quick()
    network, tokenizer = load(model, dtype, device)
    with spinner() as progress:
        found = task_runs.run_tasks(
            network,
            tokenizer,
            {
                with_digest(Path(name)) if Path(name).is_file() else name: content
                for name in text or texts.names()
                for content in texts_of([name]).values()
            },
            tasks=task or tuple(TASKS),
            contexts=context or chosen.contexts,
            methods=method or chosen.methods,
            compressions=compression or [4.0],
            prompts=prompts or chosen.prompts,
            seed=seed,
            calibration=load_calibration(calibration),
            name=model,
            calibrated_on=with_digest(calibration) if calibration else "",
            compile=compile,
            path=json,
            progress=progress,
        )
    shown = [
        {
            **{name: row[name] for name in ("task", "tokens", "method")},
            "x": row["compression"], "answers": row["answers"], "full": row["full_accuracy"],
            "accuracy": row["accuracy"], "agrees": row["agreement"],
            "bytes": row["bytes"] / row["full_bytes"],
        }
        for row in found
    ]  # fmt: skip
    title = f"Tasks on {model} (full: the full cache's accuracy; bytes: of a full bf16 cache's)"
    out.print(results_.table(title, shown))
