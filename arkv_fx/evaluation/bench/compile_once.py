"""What ``compile`` runs in a process of its own: ``python -m ... '{"method": ...}'``."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from arkv_fx.calibration import Calibration, LayerStatistics, fingerprint
from arkv_fx.evaluation.bench.caches import load_model
from arkv_fx.evaluation.bench.cases import Options
from arkv_fx.evaluation.bench.timing import compiled, pinned
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.layers import sliding_windows
from arkv_fx.transforming import restore, transform

PROMPT = 128


@dataclass(frozen=True)
class Order:
    """A method of the section ``compile`` and how it runs; see ``Options``."""

    method: str
    model: str
    dtype: str
    device: str
    slots: int
    threads: int
    backend: str
    tiers: Sequence[str] | None = None

    def options(self) -> Options:
        """The same for loading and configuring."""
        return Options(
            dtype=getattr(torch, self.dtype),
            device=torch.device(self.device),
            slots=self.slots,
            backend=self.backend,
            model=self.model,
            tiers=None if self.tiers is None else tuple(self.tiers),
        )


def cpu_seconds() -> float:
    """Of this process and of its children that have ended, since they began."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def excess(call: Callable[[], Any]) -> float:
    """CPU-seconds that the first call takes more than the second: it compiles."""
    marks = [cpu_seconds()]
    for _ in range(2):
        call()
        marks.append(cpu_seconds())
    return max(0.0, (marks[1] - marks[0]) - (marks[2] - marks[1]))


def generated() -> int:
    """Graphs that this process has generated code for: Inductor found them nowhere."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]  # looked up anew: Dynamo replaces it
    return found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"]


def measure(order: Order) -> dict[str, Any]:
    """CPU-seconds of compilation by what is compiled."""
    options = order.options()
    network = load_model(options)
    ids = torch.zeros(1, PROMPT, dtype=torch.long, device=options.device)
    if order.method.startswith("arkv-"):
        return _arkv(network, ids, order.method.removeprefix("arkv-"), options)
    cache: Any = DynamicCache(config=network.config)
    dynamic = order.method.startswith("dynamic")
    if not dynamic:
        cache = StaticCache(config=network.config, max_cache_len=PROMPT + 8)
    network(input_ids=ids, past_key_values=cache, use_cache=True)
    run = compiled(network.forward, options.backend, dynamic=dynamic)
    return {"decode": excess(lambda: _two_steps(run, ids, cache))}


def _two_steps(run: Callable[..., Any], ids: Tensor, cache: Any) -> None:
    """Two, for the second may be the one that finds out what changes from step to step."""
    for _ in range(2):
        run(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def _arkv(network: PreTrainedModel, ids: Tensor, lowering: str, options: Options) -> dict[str, Any]:
    """Both graphs, then again with a calibration that gives every layer the same slots."""
    config = options.config(options.slots or 0)
    found: dict[str, Any] = {}
    before = 0
    row = LayerStatistics(0, 1.0, 1.0, 1.0, 1.0, config.oq_ratio)
    rows = tuple(
        LayerStatistics(**{**vars(row), "layer": index})
        for index in range(len(sliding_windows(network)))
    )
    again = Calibration(fingerprint(network), "normalised", config.taus, (PROMPT,), rows)
    for prefix, calibration in (("", None), ("recalibrated ", again)):
        transform(network, config, calibration or False, compile=lowering)
        caches = [ArkvCache(network) for _ in range(2)]
        rest = iter(caches)
        found[prefix + "prefill"] = excess(
            lambda rest=rest: network(input_ids=ids, past_key_values=next(rest), use_cache=True)  # type: ignore[misc]
        )
        found[prefix + "decode"] = excess(
            lambda cache=caches[0]: _two_steps(network, ids, cache)  # type: ignore[misc]
        )
        restore(network)
        if not prefix:
            before = generated()
    found["graphs"] = generated() - before
    return found


def main() -> None:
    """Print the result as a line of JSON."""
    order = Order(**json.loads(sys.argv[1]))
    with pinned(order.threads):
        print(json.dumps(measure(order)))


if __name__ == "__main__":
    main()
