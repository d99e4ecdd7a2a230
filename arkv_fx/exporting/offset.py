"""Let a captured graph count from the number of tokens before its call, given as an input.

Where a model keeps its own cache, that number is a size (of its past) or a number in Python (the
start of a slice), and a graph of fixed shapes has neither. Positions become ``arange`` plus the
input ``arkv_offset``, rows of tables are looked up from there on, and masks of decoded tokens that
hide nothing are left out. Does NOT guess: whatever else hangs on that number is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from arkv_fx.errors import ExportError
from arkv_fx.ops.signatures import AttendArguments
from arkv_fx.passes.fold import is_constant, look_at, what_is_shown
from arkv_fx.passes.nodes import (
    ARITHMETIC,
    arguments,
    example,
    module_path,
    op_name,
    rank_of,
    shape,
    sizes_of,
    whole_index,
)
from arkv_fx.passes.roles import Role, add_input, added
from arkv_fx.passes.sites import Buffer, Cache, Cat, Planned

MANY = 4096
SCALARS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def count_from_offset(
    graph: GraphModule, ids: Node, positions: Node | None, sites: Sequence[Planned], fresh: bool,
    constants: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Let the graph of a prompt count from 0, and that of a step from an input.

    Args:
        ids: the placeholder of the token ids [B, T].
        positions: that of the positions [T], if there is one.
        sites: the attention over its caches.
        fresh: for a prompt.
        constants: the model's tensors by placeholder.

    Raises:
        ExportError: naming what cannot be followed.
    """
    starts = added(graph, "start")
    offset = None if fresh else add_input(graph, Role("offset"))
    first = next(n for n in graph.graph.nodes if n.op != "placeholder")
    if positions is not None:
        with graph.graph.inserting_before(first):
            length = graph.graph.call_method("size", (ids, 1))
            counted = _count(graph, length, offset, {"device": example(ids).device})
        positions.replace_all_uses_with(counted)
    if offset is None:
        sizes = [*sizes_of(ids)[1:], *(shape(positions) or ())]
    else:
        sizes = [size for planned in sites for size in _before(planned.cache)]
        for start in starts:
            start.replace_all_uses_with(offset)
    symbols = {size.node.expr for size in sizes if isinstance(size, torch.SymInt)}
    if offset is not None:
        _drop_masks(graph, symbols, constants)
        graph.graph.eliminate_dead_code()
    for node in list(graph.graph.nodes):
        _Rewriter(graph, symbols, offset).visit(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _before(cache: Cache) -> list[Any]:
    """The number of tokens before a call, as its graph knows it: sizes or a start.

    A past that the model itself crops says nothing of it.
    """
    if isinstance(cache, Buffer):
        return [example(cache.start)]
    if not isinstance(cache, Cat) or cache.sliding:
        return []
    return [sizes_of(past)[cache.token_dim] for past in cache.past if past is not None]


def _count(graph: GraphModule, length: Any, first: Node | None, options: dict[str, Any]) -> Node:
    """``first``, ``first`` + 1, ..., so many."""
    index = graph.graph.call_function(torch.arange, (length,), options)
    if first is None:
        return index
    return graph.graph.call_function(operator.add, (index, first))


def _drop_masks(graph: GraphModule, symbols: set[Any], constants: Mapping[str, Tensor]) -> None:
    """Leave out masks over all tokens so far that show all of them.

    Raises:
        ExportError: for one that hides some or is a bias: it grows with the text.
    """
    for node in graph.graph.nodes:
        if op_name(node) not in ("attend", "peek"):
            continue
        given: AttendArguments[Node] = AttendArguments.of(node)
        if (mask := given.mask) is None:
            continue
        if isinstance((shape(mask) or (0,))[-1], int):
            continue  # over a whole buffer
        if not is_constant(mask, constants) or not _hides_nothing(mask, symbols, constants):
            raise ExportError(
                f"{module_path(node)}: its logits have a mask or a bias in every step, which grows "
                "with the text"
            )
        replace(given, mask=None).write(node)


def _hides_nothing(mask: Node, symbols: set[Any], constants: Mapping[str, Tensor]) -> bool:
    """Whether it shows all of few tokens and of many, and changes no logit."""
    for bound in (None, MANY):
        seen = (look_at(mask, constants, symbol, bound) for symbol in symbols)
        value = next((x for x in seen if x is not None), None)
        if value is None or (bound is None and not value.numel()):
            return False  # beyond the end of a table there is nothing to see
        shown, changes = what_is_shown(value, 1.0, False)
        if changes or not shown.all():
            return False
    return True


class _Rewriter:
    """Replaces what reads the number of tokens before by what reads the input.

    In a prompt there are none (``offset`` is None), and ``symbols`` is the number of its tokens:
    the first rows of tables are looked up, because a slice would bound that number.
    """

    def __init__(self, graph: GraphModule, symbols: set[Any], offset: Node | None) -> None:
        self.graph, self.symbols, self.offset = graph, symbols, offset
        self.symbol = next(iter(symbols), 0)

    def visit(self, node: Node) -> None:
        """Rewrite a node if it makes a tensor from that number."""
        if node.op not in ("call_function", "call_method") or isinstance(example(node), SCALARS):
            return
        if not any(self._hangs(x) for x in node.all_input_nodes):
            return
        with self.graph.graph.inserting_before(node):
            new = self._rewritten(node, op_name(node))
        if new is None and self.offset is None:
            return
        if new is None:
            raise ExportError(
                f"{module_path(node) or 'its forward'}: {node.format_node()} hangs on the number "
                "of tokens before this call, and a graph of fixed shapes has no such size"
            )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self.graph.graph.erase_node(node)

    def _rewritten(self, node: Node, name: str) -> Node | None:
        if name == "getitem":
            return self._rows(node)
        if name == "narrow":
            given = arguments(node, ["x", "dim", "start", "length"])
            span = self._span(given["start"], given["length"], 0)
            return self._look_up(given["x"], given["dim"], *span) if span else None
        if self.offset is None:
            return None
        if name == "arange":
            given = arguments(node, ["start", "end", "step"] if len(node.args) > 1 else ["end"])
            start, end = given.pop("start", 0), given.pop("end")
            span = self._span(start, end) if given.pop("step", 1) == 1 else None
            return None if span is None else _count(self.graph, *span, given)
        if name in ARITHMETIC | {"iadd"} and not any(self._hangs(x) for x in node.kwargs.values()):
            args = [self._tensor(x) if self._hangs(x) else x for x in node.args]
            if None not in args:
                return self.graph.graph.create_node(node.op, node.target, tuple(args), node.kwargs)
        return None

    def _rows(self, node: Node) -> Node | None:
        """``table[s : s + n]`` and ``table[s]``, along any dimension."""
        table: Any = node.args[0]
        index = list(whole_index(node.args[1], rank_of(table)))
        for dim, entry in enumerate(index):
            ends = (entry.start, entry.stop) if isinstance(entry, slice) else (entry,)
            if not any(self._hangs(x) for x in ends):
                continue
            if not all(isinstance(x, slice) for x in index[:dim]):
                return None
            span: tuple[Any, Node | None] | None
            if isinstance(entry, slice):
                span = self._span(entry.start or 0, entry.stop) if entry.step in (None, 1) else None
                index[dim] = slice(None)
            else:
                first = self._tensor(entry)
                span = None if first is None else (1, first)
                index[dim] = 0
            if span is None:
                return None
            table = self._look_up(table, dim, *span)
        return self.graph.graph.call_function(operator.getitem, (table, tuple(index)))

    def _look_up(self, table: Node, dim: int, length: Any, first: Node | None) -> Node:
        rows = _count(self.graph, length, first, {"device": example(table).device})
        return self.graph.graph.call_function(torch.index_select, (table, dim, rows))

    def _span(self, start: Any, end: Any, base: Any = None) -> tuple[Any, Node | None] | None:
        """How many numbers, and from which one on (None: 0); None if either is not known.

        ``end`` is counted from ``base``, if given, else from 0.
        """
        if self.offset is None:
            return (end, None) if start == 0 and isinstance(end, Node) else None
        first = self._tensor(start)
        if first is None or end is None:
            return None
        length = self._expr(end) - (self._expr(start) if base is None else base)
        return None if getattr(length, "free_symbols", ()) else (int(length), first)

    def _tensor(self, number: Any) -> Node | None:
        """A number of the form offset + c as a tensor."""
        if self.offset is None:
            return None
        more = self._expr(number) - self.symbol
        if getattr(more, "free_symbols", ()):
            return None
        if not more:
            return self.offset
        return self.graph.graph.call_function(operator.add, (self.offset, int(more)))

    def _expr(self, number: Any) -> Any:
        """A number as an expression in one symbol: all that are known are one number."""
        value = example(number) if isinstance(number, Node) else number
        if not isinstance(value, torch.SymInt):
            return value
        return value.node.expr.xreplace(dict.fromkeys(self.symbols, self.symbol))

    def _hangs(self, number: Any) -> bool:
        value = example(number)
        symbolic = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
        return symbolic and not self.symbols.isdisjoint(value.node.expr.free_symbols)
