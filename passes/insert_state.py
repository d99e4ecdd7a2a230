"""Give causal self-attention that knows no cache one of ours.

Fires on attention whose queries, keys and values are projections of the same tokens, and which is
causal: by ``is_causal``, or by a mask made of constants and sizes alone (a ``tril`` buffer), which
is then dropped, unless it is a bias as well (ALiBi): ``grow_masks`` then sees to it. Does NOT fire
on attention that may look ahead (encoders), nor on attention over other tokens than its own
(cross-attention): both go on computing what they computed.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

from arkv_fx.passes.context import Context, Insertion
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.fold import LARGEST, causal_window, is_constant, look_at, what_is_shown
from arkv_fx.passes.nodes import op_name, shape
from arkv_fx.passes.sites import Inserted, Site
from torch import SymInt
from torch.fx import GraphModule, Node

MIXES = {
    "matmul", "linear", "bmm", "mm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "embedding",
    "scaled_dot_product_attention",
}  # fmt: skip
LEVELS = 2
"""Projections between a token and its query, key or value: two, where they are factored."""


def run(graph: GraphModule, context: Context) -> int:
    """Give every causal self-attention an ``Inserted``, if the context asks for it."""
    if context.insertion is None:
        return 0
    matches = 0
    for site in context.sites:
        if not site.source:
            _match(site, context.insertion)
            matches += site.cache is not None
    return matches


PASS = Pass("insert_state", run, needs=("sites", "caches"), gives=("insertions",))


def _match(site: Site, insertion: Insertion) -> None:
    queries, keys = (shape(site.q) or ())[-2:-1], (shape(site.k) or ())[-2:-1]
    if not queries or str(queries) != str(keys):
        site.refuse("not self-attention: queries and keys are not equally many")
        return
    if not isinstance(queries[0], SymInt):
        site.refuse(
            f"its number of tokens is always {queries[0]}, which the model fixes or its forward "
            "makes a constant of (by int(), or len() of a tensor; .shape does not)"
        )
        return
    tokens = queries[0].node.expr
    if not set.intersection(*(_streams(x, LEVELS) for x in (site.q, site.k, site.v))):
        site.refuse("queries, keys and values are not projections of the same tokens")
        return
    window = _window(site, insertion, tokens)
    if window is None:
        return
    if insertion.tokens not in (None, tokens):
        site.source = "insert"
        site.refuse("two causal self-attentions run over different token counts")
        return
    insertion.tokens = tokens
    site.layer = site.ordinal
    site.keep(Inserted(new_k=site.k, new_v=site.v, fresh=insertion.fresh, nodes=[], sliding=window))


def _window(site: Site, insertion: Insertion, tokens: Any) -> int | None:
    """How far back it looks (0: to the first) if ``is_causal`` or its masks hide later tokens.

    Masks that do no more are dropped. None, and a reason, if later tokens are not hidden.
    """
    if site.is_causal and not site.biases:
        return 0
    if not site.biases:
        site.refuse("bidirectional: neither is_causal nor a mask hides later tokens")
        return None
    masks = []
    biased = False
    for bias in site.biases:
        if not is_constant(bias.node, insertion.constants):
            site.refuse("its mask depends on what the model is given, not on positions alone")
            return None
        value = look_at(bias.node, insertion.constants, tokens, insertion.bounds.get(tokens))
        if value is None:
            site.refuse(f"its mask cannot be looked at as a whole (more than {LARGEST} tokens)")
            return None
        shown, changes = what_is_shown(value, bias.factor, bias.drop)
        biased = biased or changes
        masks.append(shown)
    window = causal_window(reduce(operator.and_, masks))
    if window is None:
        site.refuse("its mask does not hide later tokens and nothing else")
        return None
    if not biased:
        site.biases = []
    return window


def _streams(node: Node, levels: int) -> set[Node]:
    """The tensors whose projection ``node`` is, at most ``levels`` projections up."""
    found: set[Node] = set()
    todo, seen = [(node, levels)], {node}
    while todo:
        current, left = todo.pop()
        mixes = op_name(current) in MIXES and current.op == "call_function"
        if mixes:
            # An embedding's tokens stand behind its table.
            index = 1 if op_name(current) == "embedding" else 0
            stream = current.args[index]
            if isinstance(stream, Node):
                found.add(stream)
            left -= 1
        for source in current.all_input_nodes if left else []:
            if source not in seen:
                seen.add(source)
                todo.append((source, left))
    return found
