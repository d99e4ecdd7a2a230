"""Paired timing: all methods in turn, round after round, on data that no cache holds."""

from __future__ import annotations

import functools
import random
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from arkv_fx.huggingface.compiled import own_code

Call = Callable[[], Any]
T = TypeVar("T")

MOST_COPIES = 256
"""Copies of one layer's data; that of tiny layers stays in a cache all the same."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one method's calls: the median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Of at least one call."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0])
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high)


def stopwatch(device: torch.device) -> Callable[[Call], tuple[float, Any]]:
    """A function that runs a call and returns (seconds, its result).

    On CUDA the seconds are between two events on the stream, so they hold a wait for the host
    where the host is slower than the device, as in real decoding.
    """
    if device.type != "cuda":
        return _wall

    def run(call: Call) -> tuple[float, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result

    return run


def _wall(call: Call) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def interleaved(
    methods: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int = 2,
    watch: Callable[[Call], tuple[float, Any]] = _wall,
    after: Callable[[Mapping[str, Any]], None] = lambda results: None,
) -> dict[str, Timing]:
    """Time every method once a round; what slows the machine down for a while slows them all.

    Each round has an order of its own, so that none always runs in the wake of the same one.

    Args:
        methods: calls by name; one is made for each round, and ``warmup`` before.
        after: called at the end of each round, warm-up included, with the results by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    order = random.Random(0)
    for index in range(warmup + rounds):
        results: dict[str, Any] = {}
        for name in order.sample(list(methods), len(methods)):
            taken, results[name] = watch(methods[name])
            if index >= warmup:
                seconds[name].append(taken)
        after(results)
    return {name: Timing.of(taken) for name, taken in seconds.items()}


class Rotation(Generic[T]):
    """Enough copies of some data that a cache cannot hold it from one use to the next.

    All methods that read the same data share one rotation: the next one takes the next copy.

    Args:
        make: makes one copy.
        nbytes: bytes of a copy.
        cold: bytes that all copies together should exceed.
    """

    def __init__(self, make: Callable[[], T], nbytes: int, cold: int) -> None:
        number = min(MOST_COPIES, max(2, -(-cold // max(1, nbytes))))
        self.copies = [make() for _ in range(number)]
        self.used = 0

    def __call__(self) -> T:
        """The next copy."""
        self.used += 1
        return self.copies[self.used % len(self.copies)]


def cold_bytes(device: torch.device) -> int:
    """Twice the last-level cache, in bytes."""
    return 2 * cache_bytes(device)


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """The last-level cache in bytes; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = [
        int(path.read_text().strip().removesuffix("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(found, default=32 * 2**20)


def compiled(
    call: Callable[..., Any],
    backend: str,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """``torch.compile`` for one use: it shares no recompile limit with another.

    ``settings`` are Inductor's, for that backend alone.
    """
    if settings and backend == "inductor":
        options["options"] = settings
    fresh: Callable[..., Any] = torch.compile(own_code(call), backend=backend, **options)
    return fresh


@contextmanager
def pinned(threads: int) -> Generator[None]:
    """Run without gradients on so many threads, and without warnings about how Dynamo traces."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            yield
    finally:
        torch.set_num_threads(before)
