"""What the subcommands share: options, loading, a spinner."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from arkv_fx import models, texts
from arkv_fx.calibration import Calibration
from arkv_fx.commands.console import err
from arkv_fx.config import PRESETS, ArkvConfig, preset
from arkv_fx.errors import ConfigError, EvaluationError
from arkv_fx.files import obstacle_to_folder, write_text


class DType(StrEnum):
    """Dtypes that models are loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Lowering(StrEnum):
    """How rewritten graphs run."""

    eager = "eager"
    inductor = "inductor"
    reduce_overhead = "reduce-overhead"
    reference = "reference"


class Weights(StrEnum):
    """Kinds of weights that linear layers can be quantized to."""

    int8 = "int8"
    int4 = "int4"


def writable(path: Path | None) -> Path | None:
    """A file that can be written when all is done: looked at before anything is computed.

    Raises:
        EvaluationError: if it is a folder, or in one that is not there or cannot be written.
    """
    if path is None or path.exists():
        bad = path is not None and (path.is_dir() or not os.access(path, os.W_OK))
        reason = "it is a folder, or not to be written" if bad else ""
    else:
        folder = path.absolute().parent
        good = folder.is_dir() and os.access(folder, os.W_OK)
        reason = "" if good else f"{folder} is not there, or no folder, or not to be written"
    if reason:
        raise EvaluationError(f"{path}: cannot be written: {reason}")
    return path


def new_folder(path: Path) -> Path:
    """A folder that can be made, or is there and empty: looked at before anything is computed.

    Raises:
        EvaluationError: if it is neither.
    """
    if reason := obstacle_to_folder(path):
        raise EvaluationError(reason)
    return path


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help=f"{', '.join(models.PACKAGED)}, a transformers id or a local folder."
    ),
]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="The dtype of weights and cache.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", callback=writable, help="Also write the result here, as JSON."),
]
Page = Annotated[
    Path,
    typer.Option("--out", "-o", callback=writable, help="The page, a file of HTML."),
]
Compression = Annotated[
    float | None,
    typer.Option(min=1, help="Times fewer bytes than the full cache in --dtype (4)."),
]
Budget = Annotated[
    int | None, typer.Option(min=1, help="Tokens kept per layer, instead of a compression.")
]
Context = Annotated[
    int | None, typer.Option(min=1, help="Tokens at which the compression is meant.")
]
Preset = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
CalibrationFile = Annotated[
    Path | None,
    typer.Option("--calibration", help="A file of `arkv calibrate`; else as `transform` does."),
]


def load(
    name: str, dtype: DType, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer.

    Raises:
        ModelNotFoundError: if there is no such model or it is damaged.
        EvaluationError: if there is no such device.
    """
    transformers_logging.disable_progress_bar()
    return models.load(name, getattr(torch, dtype), device_of(device))


def device_of(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        EvaluationError: if there is no such device.
    """
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
        if place.type == "meta":
            raise RuntimeError("tensors there have no numbers")
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"device {name!r} is not to be had: {error}") from error
    return place


def configure(name: str, compression: float | None, budget: int | None, context: int) -> ArkvConfig:
    """The preset ``name`` with the size that was asked for.

    Raises:
        ConfigError: if both sizes are given or the preset is unknown.
    """
    if compression is not None and budget is not None:
        raise ConfigError("give --compression or --budget, not both")
    size: dict[str, Any] = {"context": context}
    if compression is not None:
        size["compression"] = compression
    if budget is not None:
        size["budget"] = budget
    return preset(name).replace(**size)


def load_calibration(path: Path | None) -> Calibration | None:
    """The calibration in a file, or None without a file."""
    return Calibration.load(path) if path else None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        EvaluationError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read as text: {error}") from error


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, chosen: Sequence[str] | None
) -> dict[str, torch.Tensor]:
    """Token ids [T] by name: of files where they exist, else of the shipped texts (None: all).

    Raises:
        UnknownOptionError: if it is neither a file nor a text.
    """
    return {
        name: tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        for name, text in texts_of(chosen).items()
    }


def texts_of(chosen: Sequence[str] | None) -> dict[str, str]:
    """Texts by name: of files where they exist, else those that are shipped (None: all).

    Raises:
        UnknownOptionError: if it is neither a file nor a text.
    """
    return {
        Path(name).stem: read_text(Path(name)) if Path(name).is_file() else texts.read(name)
        for name in chosen or texts.names()
    }


def with_digest(path: Path) -> str:
    """The name of a file, and what tells it from another of that name."""
    return f"{path.name}#{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def write_json(path: Path | None, value: Any) -> None:
    """Write ``value`` if a path is given."""
    if path is not None:
        write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def spinner() -> Generator[Callable[[str], None]]:
    """A function that shows what is being done: a spinner, or lines where there is no terminal."""
    if not sys.stderr.isatty():
        yield lambda message: err.print(message, markup=False, highlight=False, soft_wrap=True)
        return
    with err.status("") as status:
        yield lambda message: status.update(message)
