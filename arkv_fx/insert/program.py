"""One graph with inserted states, rewritten and lowered: for a prompt, a chunk or one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from arkv_fx.calibration import Calibration
from arkv_fx.compile.pieces import Compiled, compile_pieces
from arkv_fx.compile.replay import Replay
from arkv_fx.compile.uncompiled import UNCOMPILED, run_as_it_is
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import TransformError
from arkv_fx.insert.tracing import Captured
from arkv_fx.passes import pipeline
from arkv_fx.passes.context import Context, Insertion, StandIn
from arkv_fx.passes.fold import size_at
from arkv_fx.passes.nodes import example
from arkv_fx.passes.roles import added_in_order, kept
from arkv_fx.passes.sites import Site
from arkv_fx.state.session import LayerState, Session, check_finite


@dataclass
class Program:
    """A rewritten graph for the first tokens of a sequence or for later ones."""

    graph: GraphModule
    compiled: Compiled
    context: Context
    insertion: Insertion
    replay: Replay | None = None

    def __post_init__(self) -> None:
        self.added = added_in_order(self.graph)

    @property
    def sites(self) -> list[Site]:
        """All attention sites of the graph."""
        return self.context.sites

    @property
    def biased(self) -> bool:
        """Whether a bias by position must reach over all tokens so far."""
        return any(planned.site.biases for planned in self.context.fused)

    @property
    def fresh(self) -> bool:
        """Whether it is for the first tokens."""
        return self.insertion.fresh

    @property
    def tokens(self) -> Any:
        """The symbol of the number of new tokens."""
        return self.insertion.tokens

    def __call__(self, inputs: Sequence[Any], session: Session, seen: int) -> Any:
        """The flat outputs for new tokens behind the ``seen`` ones of the session."""
        given: dict[tuple[str, int | None], list[Tensor]] = {}
        states: dict[int, LayerState] = {}
        caches = self.context.caches
        for planned in caches:
            state = session.layer(planned.layer, planned.plan, planned.batch, planned.device)
            states[planned.layer] = state
            given["state", planned.site.ordinal] = state.tensors
        given["offset", None] = [torch.full((), seen, device=caches[0].device)]
        extra = [x for what in self.added for x in given[what]]
        with torch.no_grad():
            if self.replay is not None:
                out = self.replay([*inputs, *extra], [*states.values()])
            else:
                out = self.compiled(*inputs, *extra)
        check_finite(states.items())
        return out


def build(
    captured: Captured,
    config: ArkvConfig,
    calibration: Calibration | None,
    lowering: str,
    *,
    fresh: bool,
    one: bool = False,
    columns: int = 0,
    stand_in: StandIn | None = None,
) -> Program:
    """Run the passes on a copy of the captured graph and lower what they made.

    Args:
        lowering: see ``arkv_fx.transform``.
        fresh: for the first call of a sequence.
        one: for one new token: all extents are then numbers.
        columns: the most tokens that biases by position must reach over, if there are any.
        stand_in: what is called in place of ``arkv::attend``.

    Raises:
        TransformError: if no causal self-attention is found, or one cannot be rewritten.
    """
    insertion = Insertion(captured.constants(), captured.bounds, fresh, columns)
    context = Context(config, calibration, stand_in=stand_in, insertion=insertion)
    work = pipeline.apply(captured.graph, context)
    refused = [s for s in context.sites if s.source and not s.fused]
    if refused or not context.fused:
        what = "causal self-attention cannot be given a cache" if refused else (
            "there is no causal self-attention to give a cache to"
        )  # fmt: skip
        lines = [f"  {s.name}: {s.reason}" for s in refused or context.sites]
        lines = lines or ["  it has no attention that the passes know"]
        raise TransformError(f"{what}; the model is left as it was\n" + "\n".join(lines))
    if lowering in UNCOMPILED:
        return Program(work, run_as_it_is(work, lowering), context, insertion)
    inputs = _fakes(work, insertion.tokens, one)
    if one:
        _fix_extents(work, insertion.tokens)
    with torch.no_grad():
        compiled = compile_pieces(work, inputs)
    shapes = next(x.fake_mode.shape_env for x in inputs if isinstance(x, FakeTensor))
    if shapes is not None and insertion.tokens in shapes.replacements:
        raise TransformError(
            "compiling took the number of tokens for a constant: it equals another extent of the "
            "model; pass a sample with another number of tokens, or compile='eager'"
        )
    replay = None
    if one and lowering == "reduce-overhead":
        replay = Replay(compiled, work, insertion.constants)
    return Program(work, compiled, context, insertion, replay)


def _fakes(graph: GraphModule, tokens: Any, one: bool) -> list[Any]:
    """Fake inputs of a rewritten graph, for one token or for any number."""
    for node in graph.graph.nodes:
        # split_module takes "example_value" for Dynamo's, whose symbols are inputs.
        if "example_value" in node.meta:
            node.meta["val"] = node.meta.pop("example_value")
    nodes = graph.graph.find_nodes(op="placeholder")
    traced = [example(node) for node in nodes]
    if not one:
        return traced
    mode = next(x.fake_mode for x in traced if isinstance(x, FakeTensor))
    with mode:
        fixed = [_with_one_token(x, tokens) for x in traced]
    for node, fake in zip(nodes, fixed, strict=True):
        node.meta = {**kept(node), "val": fake}
    return fixed


def _with_one_token(value: Any, tokens: Any) -> Any:
    if not isinstance(value, Tensor) or all(isinstance(size, int) for size in value.shape):
        return value
    known = [(size, size_at(size, tokens, 1)) for size in value.shape]
    sizes = [size if number is None else number for size, number in known]
    return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _fix_extents(graph: GraphModule, tokens: Any) -> None:
    """Replace every computed size that is a number for one token by that number."""
    sizes: dict[Node, int] = {}

    def fixed(node: Node) -> Any:
        return sizes.get(node, node)

    for node in list(graph.graph.nodes):
        node.args, node.kwargs = map_arg(node.args, fixed), map_arg(node.kwargs, fixed)
        value = example(node)
        if isinstance(value, torch.SymInt) and node.op != "placeholder":
            number = size_at(value, tokens, 1)
            if number is not None:
                sizes[node] = number
    for node in reversed(sizes):
        graph.graph.erase_node(node)
    graph.recompile()
