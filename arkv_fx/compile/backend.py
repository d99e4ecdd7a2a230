"""The Dynamo backend: run the passes on a captured graph, lower it, feed it its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from arkv_fx.calibration import Calibration
from arkv_fx.compile.pieces import Compiled, compile_graph, compile_pieces, slower_kernels
from arkv_fx.compile.replay import Replay, notes
from arkv_fx.compile.replay_inputs import numbers_as_tensors
from arkv_fx.compile.uncompiled import UNCOMPILED, run_as_it_is
from arkv_fx.compile.weight_guards import SameWeights
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import UnknownOptionError
from arkv_fx.options import require_type
from arkv_fx.passes import pipeline
from arkv_fx.passes.context import Applied, Context, Probe, StandIn
from arkv_fx.passes.nodes import example, same_size, shape
from arkv_fx.passes.roles import added_in_order, role_of
from arkv_fx.passes.sites import Buffer, Cache, Cat, Marker, Site
from arkv_fx.state.anchors import Anchors
from arkv_fx.state.buffers import Buffers, first_position
from arkv_fx.state.session import LayerState, Session, check_finite, find_session

LOWERINGS = ("inductor", *UNCOMPILED, "reduce-overhead")
"""``reduce-overhead`` is ``inductor`` with decode steps replayed from CUDA graphs, on a GPU."""


class ArkvBackend:
    """Compiles graphs of one model under one configuration.

    ``graphs`` counts what was compiled and ``calls`` how often any of it ran; ``sites`` holds the
    attention sites of every graph, ``traces`` what each pass did there and how long it took.
    ``positions`` are the tokens that sequences have at most, if whoever counts them knows.
    """

    def __init__(
        self,
        config: ArkvConfig,
        calibration: Calibration | None = None,
        *,
        compile: str = "inductor",
        sliding: Sequence[int] = (),
        probe: Probe | None = None,
        stand_in: StandIn | None = None,
        whole: Mapping[int, str] | None = None,
        positions: int | None = None,
    ) -> None:
        if compile not in LOWERINGS:
            raise UnknownOptionError(f"compile={compile!r}: choose one of {list(LOWERINGS)}")
        self.config, self.calibration = config, calibration
        self.records = compile == "reduce-overhead"
        self.lowering = "inductor" if self.records else compile
        self.sliding, self.probe, self.stand_in = tuple(sliding), probe, stand_in
        self.whole, self.positions = dict(whole or {}), positions
        self.graphs = 0
        self.calls = 0
        self.sites: list[list[Site]] = []
        self.traces: list[list[Applied]] = []
        self.replays: list[Replay] = []

    def __call__(self, graph: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Compiled:
        self.graphs += 1
        alone = {
            (s.source, s.layer)
            for graph_sites in self.sites
            for s in graph_sites
            if s.source and s.reason and s.lasting
        }
        context = Context(
            self.config, self.calibration, self.sliding, self.probe, self.stand_in,
            frozenset(alone), self.whole, positions=self.positions,
        )  # fmt: skip
        work = pipeline.apply(graph, context)
        self.sites.append(context.sites)
        self.traces.append(context.trace)
        if any(isinstance(x, FakeTensor) or _is_meta(x) for x in example_inputs):
            return self._counted(graph.forward)  # shapes without numbers: only the report counts
        if not any(site.source for site in context.sites):
            # Nothing here has to do with a cache: the graph is handed on as it came.
            return self._counted(_Runner(graph, context, graph.forward, example_inputs))
        if not context.fused:
            lowered = self._lower(graph, [*example_inputs], False)
            return self._counted(_Runner(graph, context, lowered, example_inputs))
        one = self.records and all(_takes_one(planned.cache) for planned in context.fused)
        if one:
            numbers_as_tensors(work, context.fused[0].device)
        inputs = [*example_inputs, *_added_examples(work, example_inputs)]
        added = added_in_order(work)
        runner = _Runner(graph, context, self._lower(work, inputs, True), example_inputs, added)
        if one:
            runner.replay = Replay(runner.compiled, work)
            self.replays.append(runner.replay)
        if runner.begins_unknown():
            begin = replace(context, first=True)
            runner.first = self._lower(pipeline.apply(graph, begin), inputs, True)
            self.traces.append(begin.trace)
        return self._counted(runner)

    def notes(self) -> list[str]:
        """What the report says beside the sites: steps not replayed, kernels that lack a format."""
        found = notes(self.replays)
        if self.lowering != "reference":
            found += slower_kernels(chain(*self.sites), self.lowering not in UNCOMPILED)
        return found

    def _counted(self, compiled: Compiled) -> Compiled:
        """Count calls, so that a model that runs without its graphs is noticed."""

        def run(*inputs: Any) -> Any:
            self.calls += 1
            return compiled(*inputs)

        return run

    def _lower(self, graph: GraphModule, inputs: list[Any], fused: bool) -> Compiled:
        if self.lowering in UNCOMPILED or self.stand_in is not None:
            return run_as_it_is(graph, self.lowering)
        if not fused:
            return compile_graph(graph, inputs)
        return compile_pieces(graph, inputs, self.probe)


def _added_examples(graph: GraphModule, example_inputs: Sequence[Any]) -> list[Tensor]:
    """Fake tensors for the inputs that the passes added, in order."""
    mode = detect_fake_mode(list(example_inputs))
    inputs = graph.graph.find_nodes(op="placeholder")
    likes = [example(node) for node in inputs if role_of(node) is not None]
    with mode or nullcontext():
        return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in likes]


def _takes_one(cache: Cache) -> bool:
    return same_size(cache.tokens, 1)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


class _Runner:
    """Calls a compiled graph with the state of the sequence at hand appended to its inputs.

    ``added`` says what the passes added to them, see ``passes.roles.added_in_order``.
    """

    def __init__(
        self, graph: GraphModule, context: Context, compiled: Compiled, inputs: Sequence[Any],
        added: Sequence[tuple[str, int | None]] = (),
    ) -> None:  # fmt: skip
        self.weights = SameWeights(inputs)
        self.added = added
        self.placeholders = graph.graph.find_nodes(op="placeholder")
        self.compiled, self.caches = compiled, context.caches
        self.devices = [planned.device for planned in self.caches]
        self.layers = [planned.layer for planned in self.caches]
        self.where = [f"layer {p.layer} ({p.site.path})" for p in self.caches]
        self.index = {node.name: i for i, node in enumerate(self.placeholders)}
        # The same for many tokens that begin a sequence, where only a call can tell.
        self.first: Compiled | None = None
        self.replay: Replay | None = None

    def begins_unknown(self) -> bool:
        """Whether many tokens may come to a buffer that is empty or not."""
        buffers = [p.cache for p in self.caches if isinstance(p.cache, Buffer)]
        return not all(_takes_one(cache) for cache in buffers if not cache.fresh)

    def __call__(self, *inputs: Any) -> Any:
        self.weights.check(inputs)
        given: dict[tuple[str, int | None], list[Tensor]] = {}
        states: list[LayerState] = []
        sessions: dict[Node, Session] = {}
        anchors, buffers = Anchors(), Buffers()
        starts: set[int] = set()
        for planned, device, where in zip(self.caches, self.devices, self.where, strict=True):
            cache, plan, batch = planned.cache, planned.plan, planned.batch
            if isinstance(cache, Marker):
                session = sessions.get(cache.handle)
                if session is None:
                    session = find_session(self._input(cache.handle, inputs))
                    if plan.limit is not None:
                        session.require_room(plan.limit, self._extent(cache.tokens, inputs))
                    sessions[cache.handle] = session
                state = session.layer(planned.layer, plan, batch, device)
            elif isinstance(cache, Buffer):
                past = tuple(self._input(p, inputs) for p in cache.past)
                start, length = self._span(cache, inputs, where)
                state = buffers.state(past, plan, batch, start, length, where, cache.token_dim)
                starts.add(start)
                given["start", planned.site.ordinal] = [torch.full((), start, device=device)]
            elif isinstance(cache, Cat):
                past = tuple(self._input(p, inputs) for p in cache.past)
                state, anchor = anchors.state(
                    past, plan, batch, device, cache.fresh, where, cache.token_dim
                )
                given["anchor", planned.site.ordinal] = [anchor]
            else:
                continue
            given["state", planned.site.ordinal] = state.tensors
            states.append(state)
        anchors.refuse_strangers(inputs)
        buffers.refuse_strangers(inputs)
        buffers.doubt()
        for session in sessions.values():  # in doubt until the whole step is done
            session.tokens = -1
        extra = [x for what in self.added for x in given[what]]
        if self.replay is not None:
            out = self.replay([*inputs, *extra], states)
        else:
            compiled = self.first if self.first is not None and starts == {0} else self.compiled
            out = compiled(*inputs, *extra)
        check_finite(zip(self.layers, states, strict=True))
        anchors.remember(out)
        buffers.remember()
        return out

    def _span(self, cache: Buffer, inputs: Sequence[Any], where: str) -> tuple[int, int]:
        """Position of the first new token in a buffer, and how many there are."""
        start = self._input(cache.start, inputs) if isinstance(cache.start, Node) else cache.start
        positions = self._input(cache.positions, inputs)
        length = self._extent(cache.tokens, inputs)
        return first_position(start, positions, where), length

    def _extent(self, size: Any, inputs: Sequence[Any]) -> int:
        """What a size of the graph is in this call."""
        if isinstance(size, int):
            return size
        known: dict[Any, int] = {}
        for node, given in zip(self.placeholders, inputs, strict=True):
            if isinstance(given, Tensor):
                pairs = list(zip(shape(node) or (), given.shape, strict=False))
            else:
                pairs = [(example(node), given)]
            known.update({a.node.expr: int(b) for a, b in pairs if isinstance(a, torch.SymInt)})
        return int(size.node.expr.xreplace(known))

    def _input(self, node: Node | None, inputs: Sequence[Any]) -> Any:
        return inputs[self.index[node.name]] if node is not None else None


def arkv_backend(
    graph: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """``torch.compile(model, backend="arkv", options={"budget": 1024})``.

    Options are those of ``ArkvConfig`` plus ``preset``, ``compile`` (one of ``LOWERINGS``) and
    ``calibration`` (a ``Calibration``; the name of a mode, as in ``ArkvConfig.to_dict``, is that).

    Raises:
        UnknownOptionError: for an option that does not exist.
    """
    settings = dict(options or {})
    if mode not in (None, "default", "reduce-overhead"):
        raise UnknownOptionError(
            f"mode={mode!r}: the arkv backend has 'default' and 'reduce-overhead'"
        )
    lowering = settings.pop("compile", mode if mode == "reduce-overhead" else "inductor")
    calibration = settings.pop("calibration", None)
    if isinstance(calibration, str):  # the option of ArkvConfig: how one is made
        settings["calibration"], calibration = calibration, None
    wanted = "a Calibration (Calibration.load reads a file), or a mode of ArkvConfig"
    require_type("calibration", calibration, (Calibration, type(None)), wanted)
    backend = ArkvBackend(ArkvConfig.make(settings), calibration, compile=lowering)
    return backend(graph, example_inputs)
