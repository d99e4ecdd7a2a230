"""``arkv view``: a generation, and where the cache kept each token after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arkv_fx.commands.common import (
    Budget,
    CalibrationFile,
    Compression,
    Context,
    Device,
    DType,
    DTypeOption,
    Lowering,
    Model,
    Page,
    Preset,
    read_text,
    spinner,
)
from arkv_fx.commands.console import err
from arkv_fx.commands.generate import sizes_of
from arkv_fx.commands.prepared import prepare
from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.pages.render import require_templates
from arkv_fx.evaluation.pages.tier_page import tier_page
from arkv_fx.evaluation.tier_map import record
from arkv_fx.files import write_text
from arkv_fx.huggingface.cache import ArkvCache


def view(
    prompt_file: Annotated[Path, typer.Option(help="The prompt, a UTF-8 file.")],
    page: Page,
    model: Model = "smollm2",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    compression: Compression = None,
    context: Context = None,
    budget: Budget = None,
    preset: Preset = "default",
    calibration: CalibrationFile = None,
    compile: Annotated[
        Lowering | None, typer.Option(help="Default: eager for short texts on a CPU, else inductor")
    ] = None,
    dtype: DTypeOption = DType.float32,
    device: Device = "cpu",
    chat: Annotated[bool, typer.Option(help="Put the prompt into the chat template.")] = False,
) -> None:
    """Generate, and draw where the cache kept each token after every step: one HTML page.

    Greedily; --context is prompt and new tokens unless given.
    """
    require_templates()  # before anything is computed
    if page.exists() and prompt_file.exists() and prompt_file.samefile(page):
        raise EvaluationError(f"{page}: is the prompt; write the page to another file")
    text = read_text(prompt_file)
    network, tokenizer, ids, _ = prepare(
        text, new_tokens, model=model, compression=compression, context=context, budget=budget,
        preset=preset, calibration=calibration, compile=compile, dtype=dtype, device=device,
        chat=chat,
    )  # fmt: skip
    cache = ArkvCache(network)
    with spinner() as progress:
        progress("read the prompt")
        found, new = record(
            network, cache, ids, new_tokens,
            lambda tokens: progress(f"{tokens} tokens") if tokens % 16 == 0 else None,
        )  # fmt: skip
    sizes = sizes_of(cache)
    said = (
        f"{model}: {ids.shape[1]} tokens of a prompt and {len(new)} generated ones. The cache "
        f"takes {sizes['bytes'] / 2**20:.2f} MiB; a full 16-bit cache of as many tokens takes "
        f"{sizes['full_bytes_16bit'] / 2**20:.2f} MiB."
    )
    notes = list(network.arkv.report().notes)  # type: ignore[union-attr,operator]
    made = tier_page(found, tokenizer, [*ids[0].tolist(), *new], ids.shape[1], [said, *notes])
    write_text(page, made)
    size = len(made.encode()) / 2**20
    err.print(f"{page}: {size:.1f} MiB", markup=False, highlight=False, soft_wrap=True)
