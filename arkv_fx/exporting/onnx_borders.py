"""What an ONNX graph gets at its borders: prompts of any length, and names for tools to find."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from arkv_fx.formats.hadamard import constant

if TYPE_CHECKING:
    import onnx_ir as ir

HADAMARD = "hadamard"
"""In the names of rotations, and of the nodes that multiply by them: a quantizer of weights must
leave them as they are (``nodes_to_exclude``), for they decide what the cache holds.
"""


def pad_prompt(model: ir.Model, batch: int, least: int, tokens: str) -> None:
    """Let the graph fill up shorter prompts with padding on the left.

    Its inputs are all int64 [batch, tokens], zeros are padding in each of them, and the graph
    itself takes ``least`` tokens or more. ``tokens`` is how the dimension will be called.
    """
    import onnx_ir as ir

    graph = model.graph
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        node.name = node.outputs[0].name = f"prompt.{kind.lower()}.{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    def number(value: int) -> ir.Value:
        name = f"prompt.{value}"
        if name not in graph.initializers:
            held = ir.Value(name=name, const_value=ir.tensor(np.array([value], np.int64)))
            held.shape, held.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
            graph.register_initializer(held)
        return graph.initializers[name]

    uses = {value: list(value.uses()) for value in graph.inputs}
    length = add("Shape", graph.inputs[0], start=1, end=2)
    short = add("Max", add("Sub", number(least), length), number(0))
    pads = add("Concat", number(0), short, number(0), number(0), axis=0)
    for value, readers in uses.items():
        padded = add("Pad", value, pads)
        padded.shape, padded.type = value.shape, value.type
        value.shape = ir.Shape([batch, tokens])
        for use in readers:
            use.node.replace_input_with(use.idx, padded)
    graph.insert_before(graph[0], nodes)


def name_rotations(model: ir.Model) -> None:
    """Call the Hadamard matrices and the nodes that multiply by them so."""
    for value in list(model.graph.initializers.values()):
        size = _rotation(value.const_value)
        if size:
            value.name = f"{HADAMARD}.{size}.{value.name}"
            for use in value.uses():
                use.node.name = f"{HADAMARD}.{use.node.name}"


def _rotation(tensor: Any) -> int:
    """The size of a Hadamard matrix, 0 for any other tensor."""
    shape = tuple(tensor.shape) if tensor is not None and tensor.dtype.name == "FLOAT" else ()
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] & (shape[0] - 1) or not shape[0]:
        return 0
    same = torch.equal(torch.from_numpy(np.array(tensor.numpy())), constant(shape[0]))
    return int(shape[0]) if same else 0
