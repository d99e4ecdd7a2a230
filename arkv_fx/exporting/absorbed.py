"""The two graphs of a model that keeps a cache of its own: static buffers, or past tensors."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ArkvError, ExportError
from arkv_fx.exporting.captured import (
    PROMPT,
    Call,
    Captured,
    check_constants,
    check_model,
    check_sites,
    names_of,
    sample_ids,
    stray,
)
from arkv_fx.exporting.offset import count_from_offset
from arkv_fx.huggingface.compiled import own_code
from arkv_fx.passes import pipeline
from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import example, shape, sizes_of
from arkv_fx.passes.sites import Buffer, first_over_caches

PAST = ("past", "cache")
PLACES = ("pos", "start")
"""What the names of arguments for a past, or for positions, hold."""


def capture_absorbed(
    model: nn.Module, config: ArkvConfig, calibration: Calibration | None, batch: int
) -> tuple[Captured, Captured]:
    """The graphs of a prompt and of one decoded token; the model is left as it was.

    Its forward takes token ids and their positions, [T] or the first of them as an int; or token
    ids and the past that the last call returned, none at first.

    Raises:
        ExportError: if the graphs would lose anything, with the site and the reason.
    """
    check_model(model)
    return _Tracer(model, config, calibration, batch).trace()


class _Tracer:
    """Runs a short sequence through a copy of the model, which shares its parameters."""

    def __init__(
        self, model: nn.Module, config: ArkvConfig, calibration: Calibration | None, batch: int
    ) -> None:
        self.name, self.config, self.calibration = type(model).__name__, config, calibration
        self.ids = sample_ids(model, batch)[:, :1].repeat(1, PROMPT + 2)
        others = [*inspect.signature(model.forward).parameters.values()][1:]
        self.others = [p for p in others if p.kind is p.POSITIONAL_OR_KEYWORD]
        # Calls write to buffers, and may count somewhere.
        own = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        self.names = names_of(own)
        self.past = all(p.default is not p.empty for p in self.others)
        # A start is a number that may vary (Dynamo remembers which may), but for a prompt's.
        fixed = {p.name: 0 for p in self.others if p.name == self._named(PLACES) and _is_int(p)}
        self.number = bool(fixed)
        self.prompts, self.steps = (
            torch.compile(own_code(forward), backend=self._backend, fullgraph=True)
            for forward in (partial(own.forward, **fixed), own.forward)
        )

    @torch.no_grad()
    def trace(self) -> tuple[Captured, Captured]:
        if self.past:
            self._call(0, PROMPT, None)
            self.past = any(site.source == "cat" for site in self.sites)
        prompt, out = self._bound([(0, PROMPT + more) for more in (1, 2, 0)], None)
        token, _ = self._bound([(PROMPT + more, 1) for more in range(3)], out)
        return prompt, token

    def _bound(self, calls: list[tuple[int, int]], out: Any) -> tuple[Captured, Any]:
        """Make calls (start, length), which the same graph must serve but for the first."""
        graphs: list[GraphModule] = []
        for start, length in calls:
            out = self._call(start, length, out if length == 1 else None)
            self._check_sites()
            graphs.append(self.last.graph)
        if graphs[-1] is not graphs[-2]:
            raise ExportError(
                f"{self.name}: what it computes hangs on the number of tokens, or of those before "
                "them, by more than the sizes and positions that it is given (a count in Python), "
                "and a graph would keep that of its sample"
            )
        return self._bind(out), out

    def _backend(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What the passes make of a graph is kept, and the model runs as it is."""
        context = Context(self.config, self.calibration, first=self.length > 1)
        work = pipeline.apply(graph, context)

        def run(*args: Any) -> Any:
            self.last = Call.make(work, context.sites, args, graph.forward)
            self.sites = context.sites
            return self.last.outputs

        return run

    def _call(self, start: int, length: int, out: Any) -> Any:
        """Give tokens at their positions, or behind the past in what the last call returned."""
        self.length, self.sites = length, []
        self.ids_given = self.ids[:, :length].clone()
        self.places_given: Any = None
        torch._dynamo.maybe_mark_dynamic(self.ids_given, 1)
        arguments: dict[str, Any] = {}
        if self.past and out is not None:
            arguments[self._named(PAST)] = self._past_in(out)
        elif not self.past and self.others and not (self.number and length > 1):
            self.places_given = arguments[self._named(PLACES)] = self._positions(start)
        try:
            return (self.prompts if length > 1 else self.steps)(self.ids_given, **arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, ArkvError):
                raise error.inner_exception from None
            raise
        except (torch._dynamo.exc.TorchDynamoException, TypeError) as error:
            lines = str(error).strip().split("\n")
            raise ExportError(
                f"{self.name} is not one graph, called with token ids and {self._second()}: "
                + lines[0]
            ) from error

    def _check_sites(self) -> None:
        check_sites(self.name, self.sites)
        if not any(site.source for site in self.sites):
            raise ExportError(
                f"{self.name}: it keeps no cache that is known, called with token ids and "
                f"{self._second()} (insert_cache=True gives a model one)"
                + "".join(f"\n  {site.name}: {site.reason}" for site in self.sites)
            )

    def _named(self, words: Sequence[str]) -> str:
        """The argument that is called so, or the second one."""
        names = [p.name for p in self.others]
        return next((n for n in names if any(w in n for w in words)), (names or [""])[0])

    def _second(self) -> str:
        name = self._named(PAST if self.past else PLACES)
        return f"{'a past' if self.past else 'positions'} as {name}" if name else "nothing else"

    def _positions(self, start: int) -> Tensor | int:
        """The first position where it is annotated as an int, else all of them."""
        if self.number:
            return start
        places = torch.arange(start, start + self.length, device=self.ids.device)
        torch._dynamo.maybe_mark_dynamic(places, 0)
        return places

    def _past_in(self, out: Any) -> Any:
        parts = list(out.values()) if isinstance(out, dict) else list(out)
        found = [x for x in parts if any(leaf.dim() == 4 for leaf in _tensors(x))]
        if len(found) != 1:
            raise ExportError(
                f"{self.name}: its forward returns {len(found)} values with tensors [batch, heads, "
                "tokens, head dim], and one is wanted: the past of the next call"
            )
        return found[0]

    def _bind(self, out: Any) -> Captured:
        """Find out what each placeholder stands for."""
        call, graph, fresh = self.last, self.last.graph, self.length > 1
        self._keep_logits(call, out)
        caches = first_over_caches(call.sites)
        values = dict(zip(graph.graph.find_nodes(op="placeholder"), call.inputs, strict=False))
        constants = {n: self.names[id(x)] for n, x in values.items() if id(x) in self.names}
        given = {id(x): n for n, x in values.items() if isinstance(x, Tensor)}
        ids, positions = (given.get(id(x)) for x in (self.ids_given, self.places_given))
        if ids is None:
            raise ExportError(f"{self.name}: its graph does not read the token ids")
        held = {n.name: values[n] for n in constants}
        count_from_offset(graph, ids, positions, caches, fresh, held)
        names = {n.name: name for n, name in constants.items() if n.users}  # not its buffers
        check_constants(self.name, call, names)
        tokens = {str(sizes_of(ids)[1])} | {str(x) for x in shape(positions) or ()}
        sizes: dict[str, tuple[str, int]] = {}
        for node, value in values.items():
            if str(example(node)) in tokens:
                sizes[node.name] = ("input_ids", 1)
            elif node.users and node is not ids and node not in constants:
                raise ExportError(stray(self.name, node, value))
        buffers = [planned.cache for planned in caches if isinstance(planned.cache, Buffer)]
        return Captured(
            graph, names, {ids.name: "input_ids"}, sizes, caches, 0, {},
            ("input_ids",) if fresh else ("input_ids", "position_ids"),
            min((int(sizes_of(x.past[0])[x.token_dim]) for x in buffers), default=None),
        )  # fmt: skip

    def _keep_logits(self, call: Call, out: Any) -> None:
        """Let the graph return nothing else."""
        logits = [x for x in _tensors(out) if x.dim() == 3 and x.shape[1] in (1, self.length)]
        index = [i for i, x in enumerate(call.outputs) if logits and x is logits[0]]
        if not index:
            raise ExportError(f"{self.name}: it returns no logits [batch, tokens, vocabulary]")
        (output,) = call.graph.graph.find_nodes(op="output")
        output.args = ((tree_leaves(output.args[0])[index[0]],),)


def _is_int(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (int, "int")


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]
