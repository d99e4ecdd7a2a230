"""A run of tasks: every task at every length, under every method; it goes on where it stopped."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.answering import Answers, agree, answer, length, rate
from arkv_fx.evaluation.calibrations import calibrations
from arkv_fx.evaluation.fidelity import DEFAULT_METHODS, Entry, entries, make_configs
from arkv_fx.evaluation.haystack import surround
from arkv_fx.evaluation.methods import FullCache
from arkv_fx.evaluation.results import Row, RowLog
from arkv_fx.evaluation.shared_prefill import Contest
from arkv_fx.evaluation.task_cells import Cell, Clock, drawn
from arkv_fx.evaluation.tasks import TASKS, Task
from arkv_fx.huggingface.layers import text_config

FULL = Entry("full", None)
SETTINGS = (
    "model", "dtype", "compile", "text", "calibration", "seed", "prompts", "task", "tokens",
    "method", "compression",
)  # fmt: skip
"""What makes two rows the same measurement: a row of a file with all of these equal is not
measured again, and every other row is of another measurement and stays as it is."""


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    contents: Mapping[str, str],
    *,
    tasks: Sequence[str] = tuple(TASKS),
    contexts: Sequence[int] = (1024, 4096),
    methods: Sequence[str] = DEFAULT_METHODS,
    compressions: Sequence[float] = (4.0,),
    prompts: int = 20,
    seed: int = 0,
    calibration: Calibration | None = None,
    name: str = "",
    calibrated_on: str = "",
    compile: str = "eager",
    path: str | Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Ask every task of every method, beside the full cache, whose prefill they share.

    Args:
        model: a causal language model that is not transformed, in eval mode.
        contents: texts by name, of which the documents are made.
        tasks: names of ``TASKS``.
        contexts: tokens of a prompt, or of the document where the question comes later.
        compressions: bytes of a bf16 cache at these tokens divided by those allowed.
        prompts: samples of each task and length; some have several questions.
        calibration: used by the methods that take one; None: they are calibrated as
            ``transform(model)`` does it by itself, on so many tokens of the plain text.
        name, calibrated_on: what the rows call the model and the calibration.
        path: a file of lines of JSON. Rows are added as they come, those that are in it already
            are not measured again: a run that was killed loses the task and length at hand.
        progress: called with what is done next, and how long the rest may take.

    Returns:
        A row for each task, length, method and compression. ``accuracy`` is the mean score of all
        answers, ``full_accuracy`` that of the full cache's, ``agreement`` the share of answers
        with the same tokens as the full cache's, as many as were expected; ``bytes`` are measured,
        ``full_bytes`` those of a full bf16 cache at ``tokens``.

    Raises:
        EvaluationError: if a text or length does not do for a task, or the file is of another kind.
        ConfigError: for an unknown task, or a method or size that cannot work.
    """
    _check(model, contents, prompts)
    full, device = FullCache.of(model), next(model.parameters()).device
    chosen = entries(methods, compressions)
    rows = RowLog(path, SETTINGS)
    common: Row = {
        "model": name, "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "compile": compile, "text": "+".join(contents),
        "calibration": calibrated_on or ("given" if calibration else "by the text"),
        "seed": seed, "prompts": prompts,
    }  # fmt: skip

    def row_of(task: Task, tokens: int, entry: Entry) -> Row:
        return {
            **common, "task": task.name, "tokens": tokens, "method": entry.method,
            "compression": entry.compression,
        }  # fmt: skip

    known = {_key(row): row for row in rows.rows}
    cells = []
    for task, tokens in product(map(TASKS.find, dict.fromkeys(tasks)), dict.fromkeys(contexts)):
        missing = [e for e in chosen if _key(row_of(task, tokens, e)) not in known]
        samples = [
            task.make(tokenizer, *drawn(contents, task.name, tokens, seed, i))
            for i in range(prompts if missing else 0)
        ]
        cells.append(Cell(task, tokens, samples, missing, full.nbytes(tokens)))
    todo = [cell for cell in cells if cell.missing]
    done = len(cells) - len(todo)
    if done:
        progress(f"{done} of {len(cells)} tasks and lengths are in {path} already")
    if todo:
        clock = Clock(todo, progress)
        with _contest(
            model, tokenizer, contents, todo, full, calibration, compile, clock.say
        ) as contest:
            for cell in todo:
                found = _measure(contest, cell, tokenizer, device, clock)
                rows.append([row_of(cell.task, cell.tokens, e) | found[e] for e in cell.missing])
    known = {_key(row): row for row in rows.rows}
    return [known[_key(row_of(c.task, c.tokens, e))] for c in cells for e in chosen]


def _check(model: nn.Module, contents: Mapping[str, str], prompts: int) -> None:
    if not contents or prompts < 1:
        raise EvaluationError("a run takes one text and one prompt at least")
    if hasattr(model, "arkv"):
        raise EvaluationError("the model is transformed: give it as it was (arkv_fx.restore)")


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row.get(setting) for setting in SETTINGS)


def _contest(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, contents: Mapping[str, str],
    cells: Sequence[Cell], full: FullCache, calibration: Calibration | None, compile: str,
    say: Callable[[str], None],
) -> Contest:  # fmt: skip
    """All methods at all lengths: the model is traced once, and calibrated once for a length."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    configs: dict[str, ArkvConfig] = {}
    by_entry: dict[str, Calibration | None] = {}
    device = next(model.parameters()).device
    for tokens in dict.fromkeys(cell.tokens for cell in cells):
        here = [cell for cell in cells if cell.tokens == tokens]
        steps = max(length(sample) for cell in here for sample in cell.samples)
        if isinstance(most, int) and tokens + steps > most:
            raise EvaluationError(
                f"{tokens} tokens with questions and answers ({steps}) are more than the {most} "
                "positions of the model: give a smaller context"
            )
        needed = list(dict.fromkeys([FULL, *(e for cell in here for e in cell.missing)]))
        made = make_configs(needed, full, tokens, steps)
        say(f"calibrating at {tokens} tokens")
        plain = surround(tokenizer, "\n\n".join(contents.values()), tokens, [], [])
        found = calibrations(
            model, torch.tensor([plain], device=device), made,
            {e.name: e.method for e in needed}, calibration,
        )  # fmt: skip
        configs |= {_at(e, tokens): made[e.name] for e in needed}
        by_entry |= {_at(e, tokens): found[e.name] for e in needed}
    return Contest(model, configs, by_entry, compile=compile)


def _at(entry: Entry, tokens: int) -> str:
    return f"{entry.name} at {tokens}"


def _measure(
    contest: Contest, cell: Cell, tokenizer: PreTrainedTokenizerBase,
    device: torch.device, clock: Clock,
) -> dict[Entry, Row]:  # fmt: skip
    """What is in the row of each missing method beside the settings."""
    every = list(dict.fromkeys([FULL, *cell.missing]))
    said: dict[Entry, list[Answers]] = {entry: [] for entry in every}
    for index, sample in enumerate(cell.samples):
        clock.say(f"{cell.task.name}, {cell.tokens} tokens: prompt {index + 1}")
        names = [_at(entry, cell.tokens) for entry in every]
        found = answer(contest, names, cell.task, sample, device)
        for entry, name in zip(every, names, strict=True):
            said[entry].append(found[name])
        clock.done(cell)
    scores = {
        entry: [x for s, a in zip(cell.samples, given, strict=True)
                for x in rate(cell.task, s, a, tokenizer)]
        for entry, given in said.items()
    }  # fmt: skip
    return {
        entry: {
            "scored": str(cell.task.scored),
            "asked": str(cell.task.asked),
            "answers": len(scores[entry]),
            "full_accuracy": statistics.fmean(scores[FULL]),
            "accuracy": statistics.fmean(scores[entry]),
            "agreement": statistics.fmean(
                same
                for s, a, b in zip(cell.samples, said[FULL], said[entry], strict=True)
                for same in agree(s.turns, a, b)
            ),
            "bytes": max(given.nbytes for given in said[entry]),
            "full_bytes": cell.full_bytes,
        }
        for entry in cell.missing
    }
