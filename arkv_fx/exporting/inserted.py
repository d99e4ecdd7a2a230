"""The two graphs of a model that knows no cache: what ``transform(insert_cache=True)`` rewrites."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ExportError
from arkv_fx.exporting.captured import Captured, names_of, sample_ids
from arkv_fx.insert.cached_model import Inserted, insert
from arkv_fx.insert.program import Program, build
from arkv_fx.passes.nodes import shape
from arkv_fx.passes.roles import role_of
from arkv_fx.transforming import restore


def capture_inserted(
    model: nn.Module, config: ArkvConfig, calibration: Calibration | None, batch: int
) -> tuple[Captured, Captured]:
    """The graphs of a prompt and of one decoded token; the model is left as it was.

    Raises:
        ExportError: if its forward takes more than token ids, gives no logits, or adds biases by
            position to its logits, which reach over the whole text.
        TransformError: if no cache can be inserted.
    """
    insert(model, config, calibration, "reference", sample_ids(model, batch))
    try:
        state: Inserted = model.arkv  # type: ignore[assignment]
        graph, _, biased = state.captured[0]
        if biased:
            raise ExportError(
                f"{state.name}: its logits have a bias by position, which reaches over the whole "
                "text, and graphs of fixed shapes cannot"
            )
        if set(graph.leaves.values()) != {0} or any(
            value is not None for value in graph.plain.values()
        ):
            raise ExportError(f"{state.name}: its forward takes more than token ids")
        names = names_of(model)
        first, later = (
            build(graph, config, calibration, "reference", fresh=fresh) for fresh in (True, False)
        )
        held = {name: where[key] for name, (where, key) in graph.held.items()}
        bound = graph.bounds.get(first.tokens)
        return _bind(first, held, names, bound), _bind(later, held, names, bound)
    finally:
        restore(model)


def _bind(
    program: Program, held: dict[str, Tensor], names: dict[int, str], bound: int | None
) -> Captured:
    """What each placeholder of a rewritten graph stands for."""
    graph = program.graph
    constants: dict[str, str] = {}
    values: dict[str, Tensor] = {}
    inputs: dict[str, str] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        if node.name in held:
            value = held[node.name]
            constants[node.name] = names.get(id(value), f"constant.{node.name}")
            if id(value) not in names:  # made in the forward, and nobody's attribute
                values[constants[node.name]] = value
        elif role_of(node) is None:
            inputs[node.name] = "input_ids"
    return Captured(
        graph, constants, inputs, {}, program.context.caches, _logits(graph, program), values,
        ("input_ids",) if program.fresh else ("input_ids", "position_ids"), bound,
    )  # fmt: skip


def _logits(graph: GraphModule, program: Program) -> int:
    """Which output is [batch, tokens or 1, vocabulary]."""
    (output,) = graph.graph.find_nodes(op="output")
    for index, node in enumerate(tree_leaves(output.args[0])):
        sizes: Any = shape(node) or ()
        if len(sizes) == 3 and (sizes[1] == 1 or str(sizes[1]) == str(program.tokens)):
            return index
    raise ExportError("none of what its forward returns is [batch, tokens, vocabulary]")
