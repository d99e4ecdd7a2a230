"""Let biases by position (ALiBi, T5) reach over all tokens, in a model that counts from zero.

Such a bias is computed for T x T tokens. What computes it is copied with its rows for the T new
tokens and its columns for the positions of all tokens before them, of which there is room for
``columns``; the last column is the newest token. Fires only on attention into which a state was
inserted and which has a bias, and not for the first tokens of a sequence. Does NOT guess: an
operation that it cannot follow is named, and the model refused.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from arkv_fx.passes.context import Context, Insertion
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.heads import Emitter
from arkv_fx.passes.nodes import arguments, example, op_name, rank_of, same_size, shape, sizes_of
from arkv_fx.passes.shift_positions import SLICE, counts, first_rows, offset_input
from torch.fx import GraphModule, Node

from arkv_fx.errors import TransformError
from arkv_fx.ops.signatures import AttendArguments

Roles = tuple[str, ...]
"""For each dimension "rows" (new tokens), "columns" (all tokens) or "" (neither)."""
WITHOUT_TAG = {"masked_fill", "logical_not", "mul", "add", "and_", "le", "to", "_to_copy", "clone"}


def run(graph: GraphModule, context: Context) -> int:
    """Replace the mask of every ``attend`` over an inserted state."""
    if context.insertion is None or context.insertion.fresh:
        return 0
    masks: dict[Node, Node] = {}
    for node in [n for n in graph.graph.nodes if op_name(n) == "attend"]:
        given: AttendArguments[Node] = AttendArguments.of(node)
        if (mask := given.mask) is None:
            continue
        if mask not in masks:
            offset = offset_input(graph, context)
            grower = _Grower(graph, context.insertion, node, given.q, offset)
            masks[mask] = grower.grow_mask(mask)
        replace(given, mask=masks[mask]).write(node)
    return len(masks)


PASS = Pass("grow_masks", run, needs=("operators",), gives=("masks",))


class _Grower:
    """Copies what computes one mask."""

    def __init__(
        self, graph: GraphModule, insertion: Insertion, attend: Node, query: Node, offset: Node
    ) -> None:
        self.emit, self.tokens = Emitter(graph, attend), insertion.tokens
        self.columns = insertion.columns
        self.length = self.emit.size(query, -2)
        like = example(query)
        with like.fake_mode:
            index = self.emit(torch.ops.aten.arange.default, self.columns, device=like.device)
        first = self.emit(operator.add, offset, self.emit(operator.sub, self.length, self.columns))
        # Before the first token there is nothing held: any number will do.
        self.positions = {"columns": self.emit("clamp", self.emit(operator.add, index, first), 0)}
        start = self.emit(operator.sub, self.columns, self.length)
        self.positions["rows"] = self.emit(
            "narrow", self.positions["columns"], 0, start, self.length
        )
        self.copies: dict[tuple[Node, Roles], Node] = {}

    def grow_mask(self, mask: Node) -> Node:
        """[.., T, T] as [.., T, columns]."""
        return self._copy(mask, ("",) * (rank_of(mask) - 2) + ("rows", "columns"))

    def _copy(self, node: Node, roles: Roles) -> Node:
        if not any(roles):
            return node
        key = (node, roles)
        if key not in self.copies:
            self.copies[key] = self._made(node, roles)
        return self.copies[key]

    def _made(self, node: Node, roles: Roles) -> Node:
        name = op_name(node)
        given: list[Any] = list(node.args)
        if counts(node, self.tokens):
            return self.emit("to", self.positions[roles[0]], example(node).dtype)
        if (dim := first_rows(node, self.tokens)) is not None:
            source = arguments(node, SLICE)["x"]
            rest = (*roles[:dim], "", *roles[dim + 1 :])
            table = self._copy(source, rest)
            return self.emit("index_select", table, dim, self.positions[roles[dim]])
        if name == "slice" and str(shape(node)) == str(shape(given[0])):  # all of it
            return self._copy(given[0], roles)
        if name in ("full", "ones", "zeros"):
            with example(node).fake_mode:
                return self.emit(node.target, self._sizes(node, roles), *given[1:], **node.kwargs)
        if name == "embedding":
            return self.emit(node.target, given[0], self._copy(given[1], roles[:-1]))
        if name in ("tril", "triu"):
            return self._triangle(node, roles)
        if name in ("permute", "transpose"):
            order = list(range(len(roles)))
            if name == "permute":
                order = [i % len(roles) for i in given[1]]
            else:
                order[given[1]], order[given[2]] = order[given[2]], order[given[1]]
            inner = [""] * len(roles)
            for role, at in zip(roles, order, strict=True):
                inner[at] = role
            return self.emit("permute", self._copy(given[0], tuple(inner)), order)
        if name in ("view", "reshape", "unsqueeze", "squeeze", "_unsafe_view"):
            source = self._copy(given[0], self._regrouped(node, given[0], roles))
            return self.emit("reshape", source, *self._sizes(node, roles))
        if name == "expand":
            source = self._copy(given[0], self._of_input(given[0], roles))
            return self.emit("expand", source, *self._sizes(node, roles))
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not pointwise and name not in WITHOUT_TAG:
            raise self._refusal(node)
        args = [
            self._copy(x, self._of_input(x, roles)) if isinstance(x, Node) and shape(x) else x
            for x in given
        ]
        return self.emit(node.target, *args, **node.kwargs)

    def _triangle(self, node: Node, roles: Roles) -> Node:
        diagonal = arguments(node, ["x", "diagonal"]).get("diagonal", 0)
        if sorted(roles[-2:]) != ["columns", "rows"] or not isinstance(diagonal, int):
            raise self._refusal(node)
        source: Any = node.args[0]
        row, column = (self.positions[role] for role in roles[-2:])
        ahead = self.emit(
            operator.sub, self.emit("unsqueeze", column, 0), self.emit("unsqueeze", row, 1)
        )
        gone = operator.gt if op_name(node) == "tril" else operator.lt
        hidden = self.emit(gone, ahead, diagonal)
        return self.emit("masked_fill", self._copy(source, roles), hidden, 0)

    def _of_input(self, x: Node, roles: Roles) -> Roles:
        """Roles of an input that broadcasts to the output."""
        sizes = sizes_of(x)
        own = roles[len(roles) - len(sizes) :]
        return tuple("" if same_size(s, 1) else r for s, r in zip(sizes, own, strict=True))

    def _regrouped(self, node: Node, source: Any, roles: Roles) -> Roles:
        """Roles before a view that only adds or drops dimensions of size 1."""
        after = [(s, r) for s, r in zip(sizes_of(node), roles, strict=True) if str(s) != "1"]
        out, rest = [], list(after)
        for size in sizes_of(source):
            if str(size) == "1":
                out.append("")
            elif rest and same_size(rest[0][0], size):
                out.append(rest.pop(0)[1])
            else:
                raise self._refusal(node)
        return tuple(out)

    def _sizes(self, node: Node, roles: Roles) -> list[Any]:
        known = {"rows": self.length, "columns": self.columns}
        return [known.get(role, size) for size, role in zip(sizes_of(node), roles, strict=True)]

    def _refusal(self, node: Node) -> TransformError:
        return TransformError(
            f"a bias by position is computed by {node.format_node()}, which cannot be followed to "
            "positions beyond one call; the model is left as it was"
        )
