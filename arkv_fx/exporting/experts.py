"""Mixtures of experts in the graphs of engines: for any number of rows what TensorRT has for few.

transformers sorts rows by their experts, counts those of each, and multiplies the rows of each with
its weights. TensorRT sorts at most 3840 numbers and knows no products of parts whose sizes are
computed, and Torch-TensorRT makes of running sums a loop over the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from arkv_fx.errors import ExportError
from arkv_fx.passes.nodes import arguments, op_name

RUN = 128
"""Rows that one product of matrices counts."""
CASTS = {"float", "int", "to"}
PRODUCTS = {"grouped_mm_fallback", "grouped_mm", "_grouped_mm"}


def engine_forms(graph: Graph) -> dict[Node, Callable[..., Any]]:
    """For nodes of a captured graph what takes their arguments instead."""
    forms: dict[Node, Callable[..., Any]] = {}
    for node in graph.nodes:
        if op_name(node) in PRODUCTS:
            forms[node] = product_by_expert
        elif op_name(node) == "histc" and (kinds := _kinds(node)):
            forms[node] = _count
            forms.update((u, _running_sum) for u in node.users if op_name(u) == "cumsum")
            if (ordered := _sort_before(node)) is not None:
                forms[ordered] = lambda ids, kinds=kinds: order_by_kind(ids, kinds)
    return forms


def _kinds(node: Node) -> int:
    """How many whole numbers a histogram counts, 0 if its bins are not one for each."""
    given = arguments(node, ["input", "bins", "min", "max"])
    bins, least, most = (given.get(name, 0) for name in ("bins", "min", "max"))
    return int(bins) if (least, most) == (0, bins - 1) else 0


def _sort_before(node: Node) -> Node | None:
    """The sort, of nothing but numbers in a row, whose values a node counts."""
    before: Any = node.args[0]
    while op_name(before) in CASTS:
        before = before.args[0]
    if op_name(before) != "getitem" or before.args[1] != 0:
        return None
    ordered: Node = before.args[0]
    bare = op_name(ordered) == "sort" and len(ordered.args) == 1 and not ordered.kwargs
    return ordered if bare else None


def _count(x: Tensor, bins: int, min: int, max: int) -> Tensor:
    return (x[:, None] == torch.arange(bins, device=x.device)).sum(0).to(x.dtype)


def _running_sum(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return (_sums_before(x) + x).to(dtype)


def _before(count: Any, like: Tensor) -> Tensor:
    """Which of so many come before each, [count, count]."""
    index = torch.arange(count, device=like.device)
    return index < index[:, None]


def _sums_before(x: Tensor) -> Tensor:
    """Of numbers [N] the sum of those before each. No product: TensorRT may round what it takes."""
    return torch.where(_before(x.shape[0], x), x, 0).sum(-1)


def order_by_kind(ids: Tensor, kinds: int) -> tuple[Tensor, Tensor]:
    """What ``sort`` gives of whole numbers [N] from 0 to kinds - 1; of equals the first is first.

    By counting: how many of its kind stand before each, in its run of ``RUN`` and in those before.
    They are products of zeros and ones with at most ``RUN``, exact where TensorRT takes ten bits.
    """
    rows = ids.shape[0]
    runs = rows // RUN + 2  # torch.export takes 0 and 1 for other cases
    own = ids[:, None] == torch.arange(kinds, device=ids.device)  # [N, kinds]
    run, row = (torch.arange(size, device=ids.device) for size in (runs, rows))
    index = run[:, None] * RUN + torch.arange(RUN, device=ids.device)
    in_runs = own[index.clamp(max=rows - 1)] & (index < rows)[..., None]
    counted = in_runs.float()
    in_run = _before(RUN, ids).float() @ counted  # [runs, RUN, kinds]
    totals = counted.sum(1)
    earlier = _before(runs, ids).float() @ totals  # [runs, kinds]
    places = in_run + (earlier + _sums_before(totals.sum(0)))[:, None]
    mine = places.flatten(0, 1)[row]
    place = torch.where(own, mine, 0).sum(-1).long()
    order = torch.zeros_like(place).scatter(0, place, row)
    return ids[order], order


def product_by_expert(
    rows: Tensor, weights: Tensor, offs: Tensor, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """Rows [S, D] sorted by expert times weights [E, D, F]; expert e's end at offs[e]: [S, F].

    Up to E rows, a decoded token's, are each a sum of products with its expert's weights, which
    TensorRT reads where they lie: gathered for a product of matrices they were copied. More rows go
    in 2 E blocks of S // E + 2, each of one expert, which hold them however they are shared out:
    twice the products that are asked for, and copies of the weights of 2 E experts, not of each
    row's; all rows with all experts would be E times the products.

    Raises:
        ExportError: for products of another kind.
    """
    if bias is not None or out_dtype is not None or (rows.ndim, weights.ndim) != (2, 3):
        raise ExportError("of grouped products only those of rows by expert have an engine's form")
    count, experts = rows.shape[0], weights.shape[0]
    index = torch.arange(count, device=rows.device)
    expert = (offs <= index[:, None]).sum(-1)  # of each row
    if isinstance(count, int) and count <= experts:
        return (rows.float()[..., None] * weights[expert].float()).sum(1).to(rows.dtype)
    size = count // experts + 2
    ends = offs.long()
    sizes = torch.cat([ends[:1], ends[1:] - ends[:-1]])
    blocks = (sizes + (size - 1)) // size
    first, begin = _sums_before(blocks), ends - sizes
    block = torch.arange(2 * experts, device=rows.device)
    owner = (first + blocks <= block[:, None]).sum(-1).clamp(max=experts - 1)
    # What lies behind an expert's rows in its last block is multiplied, too, and not read.
    taken = ((block - first[owner]) * size + begin[owner])[:, None] + torch.arange(
        size, device=rows.device
    )
    products = rows[taken.clamp(max=count - 1)] @ weights[owner]  # [2 E, size, F]
    place = first[expert] * size + index - begin[expert]
    return products.flatten(0, 1)[place]
