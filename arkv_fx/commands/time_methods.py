"""``arkv bench``: how fast decoding, prefilling and compiling are, against what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from arkv_fx.commands.common import (
    Device,
    DType,
    DTypeOption,
    JsonFile,
    Lowering,
    Weights,
    device_of,
    spinner,
    writable,
)
from arkv_fx.commands.console import out
from arkv_fx.errors import ConfigError
from arkv_fx.evaluation.bench import CASES, SECTIONS, Options, get_case
from arkv_fx.evaluation.bench import bench as bench_
from arkv_fx.evaluation.bench import measurements as measurements_
from arkv_fx.models import PACKAGED


def bench(
    section: Annotated[
        list[str] | None, typer.Argument(help=f"Any of {', '.join(SECTIONS)} (all).")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(CASES)} (the first), or kv heads x query heads x head "
            "dimension as in 8x32x128. May be repeated."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m",
            help=f"For whole models: {', '.join(PACKAGED)}, a transformers id, a local folder, or "
            "a config.json: random weights.",
        ),
    ] = "smollm2",
    dtype: DTypeOption = DType.float32,
    device: Device = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a layer's decode step.")] = 1,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens kept per kv head (2048; 1024 in whole models)."),
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Storage format, most precise first; once or twice (the defaults)."),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Tokens in full caches, by commas (4096,8192,32768; 1024,8192 in whole models)."
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prefill.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of every method.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Timed decode steps of whole models.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    compile: Annotated[
        list[Lowering] | None,
        typer.Option(
            help="How transformed models run (inductor, and reduce-overhead on a GPU). May be "
            "repeated."
        ),
    ] = None,
    weights: Annotated[
        list[Weights] | None,
        typer.Option(help="Quantized weights of linear layers besides. May be repeated."),
    ] = None,
    json: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(callback=writable, help="An image file to draw it into.")
    ] = None,
) -> None:  # fmt: skip
    """Time every method in turn, on one thread and data out of cache, against full caches."""
    where = device_of(device)
    lowerings = [Lowering.inductor, Lowering.reduce_overhead][: 2 if where.type == "cuda" else 1]
    options = Options(
        cases=tuple(get_case(name) for name in case or list(CASES)[:1]),
        dtype=getattr(torch, dtype),
        device=where,
        batch=batch,
        slots=slots,
        contexts=_numbers(contexts) if contexts else None,
        prompt=prompt,
        rounds=rounds,
        steps=steps,
        threads=threads,
        lowerings=tuple(str(name) for name in compile or lowerings),
        model=model,
        tiers=tuple(tier) if tier else None,
        weights=tuple(str(kind) for kind in weights or ()),
    )
    with spinner() as progress:
        found = bench_(section or (), options, progress)
    for shown in measurements_.tables(found):
        out.print(shown, markup=False, highlight=False)
    if json:
        measurements_.write(json, measurements_.conditions(options), found)
    if plot:
        measurements_.plot(found, plot)


def _numbers(text: str) -> tuple[int, ...]:
    """Positive numbers by commas.

    Raises:
        ConfigError: if it is anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--contexts {text!r}: give token counts by commas, as in 4096,8192")
    return tuple(int(part) for part in parts)
