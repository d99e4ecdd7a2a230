"""What makes the block masks of ``flex_attention``, which nobody needs where it was rewritten.

``create_block_mask`` inside a model is a long way of nodes, some of them under ``vmap``, which
torch enters and leaves by calls that return nothing.
"""

from __future__ import annotations

from arkv_fx.passes.nodes import may_write, op_name
from torch.fx import GraphModule, Node

FRESH = {"new_zeros", "zeros", "zeros_like", "new_ones", "ones", "full", "new_full"}
ENTERS, LEAVES = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def makers(call: Node) -> list[Node]:
    """All that the block mask of a call is made of, but for what is written to along the way."""
    todo, seen = [n for n in call.all_input_nodes if n not in call.args], dict[Node, None]()
    while todo:
        node = todo.pop()
        if node in seen or node.op not in ("call_function", "call_method"):
            continue
        if may_write(node) and op_name(node) != "setitem":
            continue  # the model may read later what this writes
        seen[node] = None
        todo += node.all_input_nodes
        writes = {"setitem"} if op_name(node) in FRESH else set()
        todo += [u for u in node.users if op_name(u) in writes | {"_assert_tensor_metadata"}]
    return [*seen]


def leave_unused_vmaps(graph: GraphModule) -> None:
    """Erase entering and leaving ``vmap`` where nothing happens in between."""
    open_: list[tuple[Node, bool]] = []
    for node in list(graph.graph.nodes):
        name = op_name(node)
        if name == ENTERS:
            open_.append((node, True))
        elif name == LEAVES and open_:
            entered, unused = open_.pop()
            if unused:
                graph.graph.erase_node(node)
                graph.graph.erase_node(entered)
        elif name == "_add_batch_dim" and not node.users:  # an index that a mask_mod ignores
            graph.graph.erase_node(node)
        elif name != "lazy_load_decompositions":
            open_ = [(entered, False) for entered, _ in open_]
