"""The Dynamo backend: run the passes on a captured graph, lower it, feed it its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from arkv_fx.calibration import Calibration
from arkv_fx.compile.pieces import Compiled, compile_graph, compile_pieces
from arkv_fx.compile.replay import Replay
from arkv_fx.compile.replay_inputs import numbers_as_tensors
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import UnknownOptionError
from arkv_fx.passes import pipeline
from arkv_fx.passes.context import Context, Probe, StandIn
from arkv_fx.passes.nodes import example, same_size, shape
from arkv_fx.passes.roles import in_order, role_of
from arkv_fx.passes.site import Site
from arkv_fx.state.anchors import Anchors
from arkv_fx.state.buffers import Buffers, first_position
from arkv_fx.state.session import LayerState, Session, check_finite, find_session

LOWERINGS = ("inductor", "eager", "reduce-overhead")
"""``reduce-overhead`` is ``inductor`` with decode steps replayed from CUDA graphs, on a GPU."""


class ArkvBackend:
    """Compiles graphs of one model under one configuration.

    ``graphs`` counts what was compiled and ``calls`` how often any of it ran; ``sites`` holds the
    attention sites of every graph.
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
    ) -> None:
        if compile not in LOWERINGS:
            raise UnknownOptionError(f"compile={compile!r}: choose one of {list(LOWERINGS)}")
        self.config, self.calibration = config, calibration
        self.records = compile == "reduce-overhead"
        self.lowering = "inductor" if self.records else compile
        self.sliding, self.probe, self.stand_in = tuple(sliding), probe, stand_in
        self.whole = dict(whole or {})
        self.graphs = 0
        self.calls = 0
        self.sites: list[list[Site]] = []
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
            frozenset(alone), self.whole,
        )  # fmt: skip
        work = pipeline.apply(graph, context)
        self.sites.append(context.sites)
        if any(isinstance(x, FakeTensor) or _is_meta(x) for x in example_inputs):
            return self._counted(graph.forward)  # shapes without numbers: only the report counts
        if not any(site.source for site in context.sites):
            # Nothing here has to do with a cache: the graph is handed on as it came.
            return self._counted(_Runner(graph, context, graph.forward))
        if not context.fused:
            return self._counted(
                _Runner(graph, context, self._lower(graph, [*example_inputs], False))
            )
        one = self.records and all(_takes_one(site) for site in context.fused)
        if one:
            numbers_as_tensors(work, _device(context.fused[0]))
        inputs = [*example_inputs, *_added_examples(work, example_inputs)]
        runner = _Runner(graph, context, self._lower(work, inputs, True), in_order(work))
        if one:
            runner.replay = Replay(runner.compiled, work)
            self.replays.append(runner.replay)
        if runner.begins_unknown():
            begin = replace(context, first=True, sites=[], state_inputs=[])
            runner.first = self._lower(pipeline.apply(graph, begin), inputs, True)
        return self._counted(runner)

    def _counted(self, compiled: Compiled) -> Compiled:
        """Count calls, so that a model that runs without its graphs is noticed."""

        def run(*inputs: Any) -> Any:
            self.calls += 1
            return compiled(*inputs)

        return run

    def _lower(self, graph: GraphModule, inputs: list[Any], fused: bool) -> Compiled:
        if self.lowering == "eager" or self.stand_in is not None:
            return graph.forward
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


def _takes_one(site: Site) -> bool:
    return same_size((shape(site.new_k) or ())[2], 1)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _device(site: Site) -> torch.device:
    device: torch.device = example(site.new_k).device
    return device


class _Runner:
    """Calls a compiled graph with the state of the sequence at hand appended to its inputs.

    ``added`` says what the passes added to them, see ``passes.roles.in_order``.
    """

    def __init__(
        self, graph: GraphModule, context: Context, compiled: Compiled,
        added: Sequence[tuple[str, int | None]] = (),
    ) -> None:  # fmt: skip
        self.added = added
        self.placeholders = graph.graph.find_nodes(op="placeholder")
        self.compiled, self.sites = compiled, context.caches
        self.device = [_device(s) for s in self.sites]
        self.index = {node.name: i for i, node in enumerate(self.placeholders)}
        self.layers = [s.layer if s.layer is not None else s.ordinal for s in self.sites]
        # The same for many tokens that begin a sequence, where only a call can tell.
        self.first: Compiled | None = None
        self.replay: Replay | None = None

    def begins_unknown(self) -> bool:
        """Whether many tokens may come to a buffer that is empty or not."""
        unknown = [s for s in self.sites if s.source == "buffer" and not s.fresh]
        return not all(_takes_one(s) for s in unknown)

    def __call__(self, *inputs: Any) -> Any:
        given: dict[tuple[str, int | None], list[Tensor]] = {}
        states: list[LayerState] = []
        sessions: dict[Node | None, Session] = {}
        anchors, buffers = Anchors(), Buffers()
        starts: set[int] = set()
        for site, layer, device in zip(self.sites, self.layers, self.device, strict=True):
            assert site.plan is not None
            if site.source == "marker":
                session = sessions.get(site.handle)
                if session is None:
                    session = find_session(self._input(site.handle, inputs))
                    sessions[site.handle] = session
                state = session.layer(layer, site.plan, site.batch, device)
            else:
                past = tuple(self._input(p, inputs) for p in site.past)
                where = f"layer {layer} ({site.path})"
                if site.source == "buffer":
                    start, length = self._span(site, inputs, where)
                    state = buffers.state(
                        past, site.plan, site.batch, start, length, where, site.token_dim
                    )
                    starts.add(start)
                    given["start", site.ordinal] = [torch.full((), start, device=device)]
                else:
                    state, anchor = anchors.state(
                        past, site.plan, site.batch, device, site.fresh, where, site.token_dim
                    )
                    given["anchor", site.ordinal] = [anchor]
            given["state", site.ordinal] = state.tensors
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

    def _span(self, site: Site, inputs: Sequence[Any], where: str) -> tuple[int, int]:
        """Position of the first new token in a buffer, and how many there are."""
        start = self._input(site.start, inputs) if isinstance(site.start, Node) else site.start
        positions = self._input(site.positions, inputs)
        length = self._extent((shape(site.new_k) or ())[2], inputs)
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
    ``calibration`` (a ``Calibration``).

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
    backend = ArkvBackend(ArkvConfig.make(settings), calibration, compile=lowering)
    return backend(graph, example_inputs)
