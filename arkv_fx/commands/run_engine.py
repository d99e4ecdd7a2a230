"""Opening an exported folder for ``arkv generate``: by its engines or its graphs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from arkv_fx.errors import EngineError, EvaluationError
from arkv_fx.runtime import EngineSession, OnnxSession
from arkv_fx.runtime.cuda_device import CudaDevice
from arkv_fx.runtime.engine_files import capabilities
from arkv_fx.runtime.graph_session import GraphSession
from arkv_fx.runtime.manifest import read_description


class Runtime(StrEnum):
    """What runs an exported folder."""

    onnx = "onnx"
    tensorrt = "tensorrt"


def open_engine(folder: Path, runtime: Runtime | None) -> tuple[GraphSession, Runtime, list[str]]:
    """A session, what runs it, and what is to be said of the choice.

    Args:
        runtime: None for the engines, if there are any for this GPU, else ONNX Runtime.

    Raises:
        EngineError: if it cannot be opened, or not by the runtime that was asked for.
    """
    notes: list[str] = []
    held = [] if runtime is Runtime.onnx else capabilities(read_description(folder))
    if held and runtime is None:
        try:
            here = CudaDevice().capability
        except EngineError as error:
            notes = [f"onnx runs it, not its engines for {', '.join(held)}: {error}"]
        else:
            runtime = Runtime.tensorrt if here in held else Runtime.onnx
            notes = [f"{runtime} runs it: engines for {', '.join(held)}, the GPU is {here}"]
    if runtime is Runtime.tensorrt:
        return EngineSession(folder), runtime, notes
    return OnnxSession(folder), Runtime.onnx, notes


OF_MODELS = (
    "model", "compression", "context", "budget", "preset", "calibration", "compile", "dtype",
    "device", "weights",
)  # fmt: skip
"""Options of ``arkv generate`` that an exported folder has settled."""


def refuse_with_engine(ctx: typer.Context) -> None:
    """Refuse options of the cache by name, if any are given, also with what they are by default.

    Raises:
        EvaluationError: an engine has the cache that it has.
    """
    sources = {name: ctx.get_parameter_source(name) for name in OF_MODELS}
    if given := [n for n, source in sources.items() if source and source.name != "DEFAULT"]:
        names = ", ".join(f"--{name}" for name in given)
        raise EvaluationError(f"{names}: an engine has the cache that it was exported with")


def load_tokenizer(folder: Path, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in an exported folder.

    Raises:
        EvaluationError: if there is none.
    """
    if name is None:
        raise EvaluationError(f"{folder} was exported without a tokenizer")
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / name)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{folder / name}: cannot be read as a tokenizer: {error}") from error
    return found
