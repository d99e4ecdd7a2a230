"""All architectures, one after the other, in a process that may die."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from arkv_fx.errors import ModelNotFoundError
from arkv_fx.evaluation.results import Row
from arkv_fx.zoo.checks import examine
from arkv_fx.zoo.configs import KINDS, architectures
from arkv_fx.zoo.outcome import CORRECT, NOT_RUN, blank

LIMIT_S = 600.0


def run(
    names: Sequence[str] = (),
    *,
    quick: bool = False,
    limit_s: float = LIMIT_S,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Yield a row of ``examine`` for each architecture, in order.

    A name may be one of ``KINDS``, which stands for all of that kind; without names it is "causal".
    A crash, or more than ``limit_s`` seconds, gives a row with status "crashed", and the next
    architecture a new process.

    Raises:
        ModelNotFoundError: before any row, naming what transformers does not list.
    """
    chosen = _chosen(names or ["causal"])
    with _Worker(quick) as worker:
        for number, name in enumerate(chosen, 1):
            progress(f"{name} ({number} of {len(chosen)})")
            yield worker.examine(name, limit_s)


def _chosen(names: Sequence[str]) -> list[str]:
    known = architectures()
    unknown = [name for name in names if name not in known and name not in KINDS]
    if unknown:
        raise ModelNotFoundError(
            f"transformers lists no language model {', '.join(map(repr, unknown))}; give any of "
            f"{', '.join(KINDS)}, or names that `arkv zoo --list` shows"
        )
    chosen = [architectures(name) if name in KINDS else [name] for name in names]
    return list(dict.fromkeys(chain(*chosen)))


def summary(rows: Sequence[Row]) -> dict[str, int]:
    """How many architectures there are, have a cache that could be run, are fused, are correct."""
    cacheable = [row for row in rows if row["status"] not in NOT_RUN]
    return {
        "architectures": len(rows),
        "cacheable": len(cacheable),
        "fused": sum(row["status"] == "fused" for row in cacheable),
        "correct": sum(row["status"] in CORRECT for row in cacheable),
    }


class _Worker:
    """A process that examines one architecture at a time, and is replaced when it dies.

    It is kept between architectures: importing torch and transformers takes longer than most rows.
    """

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.process: BaseProcess | None = None
        self.pipe: Connection[Any, Any] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def examine(self, name: str, limit_s: float) -> Row:
        """The row of one architecture, whatever it does to the process."""
        if self.process is None or self.pipe is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.quick), daemon=True)
            self.process.start()
            theirs.close()
        self.pipe.send(name)
        try:
            if self.pipe.poll(limit_s):
                row: Row = self.pipe.recv()
                return row
            what = f"more than {limit_s:g} seconds"
        except (EOFError, ConnectionError):
            self.process.join(10)
            what = f"the process ended with exit code {self.process.exitcode}"
        self._stop()
        return blank(name) | {"status": "crashed", "error": what}

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = self.pipe = None


def _serve(pipe: Connection[Any, Any], quick: bool) -> None:
    """The worker's loop: a name comes in, a row goes out."""
    for name in _received(pipe):
        pipe.send(examine(name, quick=quick))


def _received(pipe: Connection[Any, Any]) -> Iterator[str]:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with suppress(EOFError):
        while True:
            yield pipe.recv()
