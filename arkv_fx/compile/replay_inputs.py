"""What a recording of a decode graph does with each input: leave it out, hold it, or copy it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum, auto

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from arkv_fx.passes.nodes import ARITHMETIC, example, op_name, written
from arkv_fx.passes.roles import is_added


class Kind(Enum):
    """One input of a decode graph."""

    UNUSED = auto()
    WEIGHT = auto()
    """Stays where it is; the recording reads it there."""
    STATE = auto()
    """Likewise, but of the sequence at hand."""
    GIVEN = auto()
    """New in each call: copied into a tensor of the recording."""


def kinds(graph: GraphModule, weights: Collection[str]) -> dict[Node, Kind]:
    """The kind of every input, in order; ``weights`` names some of the model's tensors."""
    return {n: _kind(n, weights) for n in graph.graph.find_nodes(op="placeholder")}


def _kind(node: Node, weights: Collection[str]) -> Kind:
    if not node.users:
        return Kind.UNUSED
    if is_added(node, "state"):
        return Kind.STATE
    # Dynamo's word for parameters and buffers of modules.
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
    return Kind.WEIGHT if static or node.name in weights else Kind.GIVEN


def why_not(graph: GraphModule, inputs: Mapping[Node, Kind]) -> str:
    """Why a decode graph cannot be recorded, "" if nothing speaks against it."""
    for node in graph.graph.nodes:
        if op_name(node) == "kv_update":
            return "a layer keeps all its keys and values in full precision, and they grow"
    places = {_storage(node): node for node, kind in inputs.items() if kind is Kind.GIVEN}
    places.pop(None, None)
    for node in graph.graph.nodes:
        for target in written(node):
            # Views of an input share its memory, in the tracer's examples as in life.
            if (found := places.get(_storage(target))) is not None:
                return f"it writes to its input {found.name}, of which a recording has a copy"
    return ""


def _storage(node: Node) -> int | None:
    value = example(node)
    return int(value.untyped_storage()._cdata) if isinstance(value, Tensor) else None


def numbers_as_tensors(graph: GraphModule, device: torch.device) -> None:
    """Make inputs that are numbers, and are only added to tensors of integers, 0-dim int64 tensors.

    The position that a model counts in Python is one: as a number it would be part of the
    recording.
    """
    for node in graph.graph.find_nodes(op="placeholder"):
        value = example(node)
        if isinstance(value, torch.SymInt) and node.users and all(map(_is_integral, node.users)):
            like = next(example(u) for u in node.users)
            node.meta = {"example_value": like.new_empty((), dtype=torch.int64, device=device)}


def _is_integral(node: Node) -> bool:
    """Whether a 0-dim tensor of integers in place of a number gives ``node`` the same value."""
    if op_name(node) not in ARITHMETIC or node.kwargs:
        return False
    values = [example(x) for x in node.args if isinstance(x, Node)]
    tensors = [x for x in values if isinstance(x, Tensor)]
    return len(tensors) == 1 and tensors[0].dtype == torch.int64 and tensors[0].dim() > 0
