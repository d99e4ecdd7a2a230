"""A graph that takes the tensors that a quantized weight is made of in place of the weight.

Inductor would take such weights apart and put them together again in every call of every piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from arkv_fx.passes.nodes import example

Inputs = Sequence[Any]


def unwrap(graph: GraphModule) -> Callable[[Inputs], list[Any]] | None:
    """Rewrite in place the inputs of which only attributes are read; what makes the new inputs.

    None if there are no such inputs. Inputs that are read otherwise as well stay as they are.
    """
    plan: list[list[str] | None] = []
    for node in graph.graph.find_nodes(op="placeholder"):
        reads = list(node.users) if is_traceable_wrapper_subclass(example(node)) else []
        apart = reads and all(n.op == "call_function" and n.target is getattr for n in reads)
        plan.append(_apart(node, reads) if apart else None)
    if not any(plan):
        return None
    graph.recompile()

    def inputs(given: Inputs) -> list[Any]:
        found: list[Any] = []
        for value, names in zip(given, plan, strict=True):
            if names is None:
                found.append(value)
            else:
                found += [getattr(value, name) for name in names]
        return found

    return inputs


def _apart(node: Node, reads: list[Node]) -> list[str]:
    """Inputs in an input's place, one for each attribute; their names."""
    names: list[str] = list(dict.fromkeys(str(read.args[1]) for read in reads))
    graph = node.graph
    with graph.inserting_before(node):
        for name in names:
            part = graph.placeholder(f"{node.name}_{name}")
            part.meta["example_value"] = getattr(example(node), name)
            for read in (read for read in reads if read.args[1] == name):
                read.replace_all_uses_with(part)
                graph.erase_node(read)
    graph.erase_node(node)
    return names
