"""A model's prefill and decode calls as rewritten graphs, by the front end that transform uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from arkv_fx.calibration import Calibration
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.compile.pieces import Compiled
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ExportError
from arkv_fx.exporting.captured import (
    PROMPT,
    Call,
    Captured,
    check_constants,
    check_model,
    check_sites,
    names_of,
    stray,
)
from arkv_fx.huggingface.compiled import CompiledForward
from arkv_fx.huggingface.layers import cached_layers, own_state, text_config, windows
from arkv_fx.huggingface.model_caches import new_cache
from arkv_fx.huggingface.transformed import Transformed
from arkv_fx.passes.nodes import example
from arkv_fx.passes.roles import role_of
from arkv_fx.passes.sites import first_over_caches
from arkv_fx.transforming import restore, transform


class _Recorder(ArkvBackend):
    """Runs rewritten graphs as they are and remembers the last call."""

    last: Call | None = None

    def _lower(self, graph: GraphModule, inputs: list[Any], fused: bool) -> Compiled:
        sites = self.sites[-1]

        def run(*args: Any) -> Any:
            self.last = Call.make(graph, sites, args, graph.forward)
            return self.last.outputs

        return run


def capture(
    model: nn.Module, config: ArkvConfig, calibration: Calibration | None, batch: int
) -> tuple[Captured, Captured]:
    """The graphs of a prompt and of one decoded token; the model is left as it was.

    Raises:
        ExportError: if the graphs would lose anything: attention that is not fused, a state that
            is not ours, a graph break, an input that changes from step to step.
    """
    check_model(model)
    _check_kind(model)
    transform(model, config, calibration or False, compile="reference")
    try:
        return _Tracer(model, config, calibration, batch).trace()
    finally:
        restore(model)


def _check_kind(model: nn.Module) -> None:
    name = type(model).__name__
    layers = cached_layers(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ExportError(f"{name}: an encoder-decoder is not exported")
    if own := [i for i, s in enumerate(own_state(layers)) if type(s).__name__ != "CompressedLayer"]:
        raise ExportError(
            f"{name}: layer(s) {own} keep a recurrent or convolution state or an indexer, which "
            "the exported graphs would lose"
        )
    if getattr(text_config(model), "attention_chunk_size", None):
        raise ExportError(f"{name}: attention in chunks of the text is not exported")


class _Tracer:
    """Runs a short sequence through a transformed model and keeps its graphs."""

    def __init__(
        self, model: nn.Module, config: ArkvConfig, calibration: Calibration | None, batch: int
    ) -> None:
        self.model, self.batch, self.name = model, batch, type(model).__name__
        state: Transformed = model.arkv  # type: ignore[assignment]
        old = state.backend
        self.recorder = _Recorder(
            config, calibration, compile="reference", sliding=old.sliding, whole=old.whole
        )
        state.compiled = CompiledForward(state.original, self.recorder, state.name, fullgraph=True)
        if "position_ids" not in state.parameters:
            raise ExportError(f"{self.name}: its forward takes no position_ids")
        self.device = next(model.parameters()).device
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in state.parameters else {}
        self.names = names_of(model)

    @torch.no_grad()
    def trace(self) -> tuple[Captured, Captured]:
        cache = new_cache(self.model)
        sliding = max(windows(cached_layers(self.model)), default=0)
        if 0 < sliding < PROMPT + 2:
            raise ExportError(
                f"{self.name}: its attention window of {sliding} tokens is shorter than the sample "
                f"of {PROMPT + 2} whose graphs are exported"
            )
        # A prompt that is longer than every attention window must take the same graph.
        self._prompt(new_cache(self.model), PROMPT)
        prefill = self._prompt(new_cache(self.model), sliding + PROMPT) if sliding else None
        first = self._prompt(cache, PROMPT)
        if prefill is not None and prefill.graph is not first.graph:
            raise ExportError(
                f"{self.name}: prompts beyond its attention window of {sliding} tokens take "
                "another graph than shorter ones, and one graph must serve all"
            )
        steps = [self._token(cache, PROMPT + i) for i in range(2)]
        if len({_text(step.graph) for step in steps}) != 1:
            raise ExportError(
                f"{self.name}: what a step computes hangs on the number of tokens before it by "
                "more than position_ids, and a graph would keep that of its sample"
            )
        return first, steps[0]

    def _prompt(self, cache: Any, length: int) -> Captured:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 16, (self.batch, length), generator=generator).to(self.device)
        mask = torch.ones_like(ids)
        mask[:, 0] = 0  # all ones would be left out of the graph
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return self._call(given, cache)

    def _token(self, cache: Any, position: int) -> Captured:
        ids = torch.ones(self.batch, 1, dtype=torch.long, device=self.device)
        found = self._call({"input_ids": ids, "position_ids": ids * (position - 1)}, cache)
        for planned in found.sites:
            if planned.site.biases:
                raise ExportError(
                    f"{planned.site.name}: its logits have a mask or a bias in every step, which "
                    "grows with the text"
                )
        return found

    def _call(self, given: dict[str, Tensor], cache: Any) -> Captured:
        self.recorder.last = None
        before = self.recorder.calls
        try:
            # Numbers of the call are constants, so that what hangs on them is seen to differ.
            with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
                out = self.model(**given, past_key_values=cache, use_cache=True, **self.last)
        except torch._dynamo.exc.TorchDynamoException as error:
            lines = str(error).strip().split("\n")
            raise ExportError(f"{self.name} is not one graph: {lines[0]}") from error
        self._check_sites()
        call = self.recorder.last
        if call is None or self.recorder.calls != before + 1:
            raise ExportError(f"{self.name}: its forward is not one graph with attention in it")
        return self._bind(call, given, out.logits)

    def _check_sites(self) -> None:
        sites = [s for s in (self.recorder.sites or [[]])[-1] if s.source]
        check_sites(self.name, sites)
        for site in sites:
            if site.source != "marker":
                raise ExportError(
                    f"{site.name}: its cache is of kind {site.source!r}; only those that "
                    "transformers manages are exported"
                )

    def _bind(self, call: Call, given: dict[str, Tensor], logits: Tensor) -> Captured:
        """Find out what each placeholder stands for."""
        nodes = call.graph.graph.find_nodes(op="placeholder")
        arguments = {id(t): name for name, t in given.items()}
        constants: dict[str, str] = {}
        inputs: dict[str, str] = {}
        sizes: dict[str, tuple[str, int]] = {}
        symbols: dict[Any, tuple[str, int]] = {}
        for node, value in zip(nodes, call.inputs, strict=True):
            if id(value) in arguments:
                name = inputs[node.name] = arguments[id(value)]
                for dim, size in enumerate(example(node).shape):
                    if isinstance(size, torch.SymInt):
                        symbols.setdefault(size.node.expr, (name, dim))
        for node, value in zip(nodes, call.inputs, strict=True):
            if node.name in inputs or role_of(node) is not None:
                continue
            if id(value) in self.names:
                constants[node.name] = self.names[id(value)]
            elif isinstance(example(node), torch.SymInt) and example(node).node.expr in symbols:
                sizes[node.name] = symbols[example(node).node.expr]
            elif node.users:
                raise ExportError(stray(self.name, node, value))
        check_constants(self.name, call, constants)
        outputs = list(call.outputs)
        found = [i for i, x in enumerate(outputs) if x is logits]
        if not found:
            raise ExportError(f"{self.name}: its logits are not an output of its graph")
        return Captured(
            call.graph, constants, inputs, sizes, first_over_caches(call.sites),
            found[0], {}, tuple(given),
        )  # fmt: skip


def _text(graph: GraphModule) -> str:
    """What a graph computes, to be compared."""
    copy = GraphModule(graph, graph.graph)
    copy.graph = type(graph.graph)()
    copy.graph.output(copy.graph.graph_copy(graph.graph, {}))
    copy.graph.eliminate_dead_code()
    return str(copy.graph.python_code("self").src)
