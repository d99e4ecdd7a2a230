"""The commands of ``arkv`` by name: each is imported when it is called, not before.

``arkv --help`` needs their names and a line each; what they compute with takes seconds to import.
"""

from __future__ import annotations

import importlib
import time
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from arkv_fx.commands.console import err
from arkv_fx.errors import ArkvError
from arkv_fx.logs import get_logger

STARTED = time.perf_counter()
"""When the command began: nothing that takes long is imported before this."""


class Entry(NamedTuple):
    """Where a command is, and the first line of its help."""

    module: str
    """In this folder."""
    name: str
    """Of the command's function, or of a ``typer.Typer`` that has commands of its own."""
    help: str


COMMANDS = {
    "generate": Entry(
        "generate", "generate",
        "Continue a prompt, greedily; --context is prompt and new tokens unless given.",
    ),
    "view": Entry(
        "view_tiers", "view",
        "Generate, and draw where the cache kept each token after every step: one HTML page.",
    ),
    "calibrate": Entry(
        "calibrate_report", "calibrate",
        "Try budgets on each layer, on sample texts: its OQ ratio and its share of the budget.",
    ),
    "report": Entry(
        "calibrate_report", "report",
        "Will it work on my model, and what will I save? Every attention, rewritten or why not.",
    ),
    "export": Entry(
        "export_graphs", "export",
        "Write prefill and decode graphs, their weights, the tokenizer and arkv.json.",
    ),
    "bench": Entry(
        "time_methods", "bench",
        "Time every method in turn, on one thread and data out of cache, against full caches.",
    ),
    "doctor": Entry(
        "doctor", "doctor",
        "Versions, devices, the compiler that Inductor needs, kernels (the first is taken), "
        "extras.",
    ),
    "zoo": Entry(
        "run_zoo", "zoo",
        "Transform a tiny model of each architecture and compare it with the model as it was.",
    ),
    "eval": Entry("evaluate", "app", "Measure what compression costs."),
}  # fmt: skip


class Group(TyperGroup):
    """The commands; errors are one line and exit code 1."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = {name: TyperCommand(name, help=e.help) for name, e in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command itself, where the list of commands has its name and a line of help."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name is not None else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):  # typer's own
                raise
            line = f"error: {said(error)}"
            err.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


def said(error: Exception) -> str:
    """An error in one line; what we did not foresee with its type, and where to see more."""
    inner = getattr(error, "inner_exception", None)  # of torch.compile
    error = inner if isinstance(inner, Exception) else error
    text = " ".join(str(error).split())
    if isinstance(error, (ArkvError, OSError)):
        return text
    kind = type(error).__name__
    if kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in text:
        return f"there is not enough memory for this: lower the sizes asked for ({text})"
    get_logger("commands").info("not foreseen", exc_info=error)
    return f"{kind}: {text} (not foreseen; with ARKV_LOG=info in the environment you see where)"


def load(name: str) -> Any:
    """The command called ``name`` (a key of ``COMMANDS``), with its arguments and its help."""
    entry = COMMANDS[name]
    found = getattr(importlib.import_module(f"arkv_fx.commands.{entry.module}"), entry.name)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False)
        alone.command(name)(found)
        found = alone
    return typer.main.get_command(found)
