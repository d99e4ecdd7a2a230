"""Recognise attention over past tensors that a model concatenates itself.

``K = cat([past_k, k], -2)`` with ``past_k`` a graph input (or an empty tensor: the first call),
the same for values; or [B, T, H, D] joined along its tokens and turned afterwards; or, in a first
call without a past, keys and values that the graph returns. The new cache value that the graph
returns becomes a zero-memory tensor of the right shape whose storage is the key to our state. Does
NOT fire when the past or the joined tensor is used by anything but this attention, shape queries
and the graph's output, since that use would read nothing; nor in a graph over an ``ArkvCache``,
where what a model still joins is what cross-attention reads.
"""

from __future__ import annotations

from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.nodes import (
    example,
    numbers,
    op_name,
    rank_of,
    same_size,
    shape,
    sizes_of,
)
from arkv_fx.passes.readers import foreign_reader
from arkv_fx.passes.sites import Cat, Site
from torch.fx import GraphModule, Node


def run(graph: GraphModule, context: Context) -> int:
    """Give every site whose cache can be absorbed its ``Cat``."""
    if any(site.source == "marker" for site in context.sites):
        return 0
    matches = 0
    for site in context.sites:
        if not site.source and (cache := _match(site)) is not None:
            site.keep(cache)
            matches += 1
    return matches


PASS = Pass("absorb_cat", run, needs=("sites", "markers"), gives=("caches",))


def _match(site: Site) -> Cat | None:
    (joined_k, dim), (joined_v, dim_v) = unturned(site.k), unturned(site.v)
    keys, values = _past_and_new(joined_k, dim), _past_and_new(joined_v, dim_v)
    if keys is None and values is None:
        return _match_first_call(site)
    if keys is None or values is None:
        site.refuse("only one of keys and values is concatenated with its past")
        return None
    (past_k, new_k, fresh), (past_v, new_v, fresh_v) = keys, values
    if fresh != fresh_v:
        site.refuse("keys have a past and values have none, or the reverse")
        return None
    if dim != dim_v:
        site.refuse("past keys and values differ in how heads and tokens are laid out")
        return None
    readers = [foreign_reader(x, site.products, output=True) for x in (joined_k, joined_v)]
    readers += [
        # One empty tensor may be the past of both.
        foreign_reader(past, [joined_k, joined_v] if past_k is past_v else [joined])
        for past, joined in ((past_k, joined_k), (past_v, joined_v))
        if past is not None
    ]
    for reader in readers:
        if reader is not None:
            site.refuse(
                f"the cache is also read by {reader.format_node()}, which cannot see compressed "
                "tokens; pass an ArkvCache instead"
            )
            return None
    return Cat(
        new_k=turned(new_k, dim),
        new_v=turned(new_v, dim),
        fresh=fresh,
        nodes=[joined_k, joined_v],
        sliding=_sliding_window(joined_k, dim),
        token_dim=dim,
        past=(past_k, past_v),
    )


def _match_first_call(site: Site) -> Cat | None:
    """The keys and values of this call alone, which the graph returns: the past of the next."""
    (k, dim), (v, dim_v) = (
        (x, 2) if _is_returned(x) else unturned(x) for x in (site.k, site.v)
    )  # fmt: skip
    if dim != dim_v or k is v or not (_is_returned(k) and _is_returned(v)):
        return None
    if any(_joins(x, dim) for x in (k, v)):  # with a past that is no input: not a first call
        return None
    queries, keys = sizes_of(site.q)[-2], sizes_of(site.k)[2]
    rows = [(shape(bias.node) or (1, 1))[-2:-1] for bias in site.biases]
    causal = site.is_causal or any(row and same_size(row[0], queries) for row in rows)
    # A single token may be the first of a sequence or all of a memory: it is kept in any case.
    if not same_size(queries, keys) or not (causal or same_size(queries, 1)):
        return None
    return Cat(new_k=site.k, new_v=site.v, fresh=True, nodes=[k, v], token_dim=dim)


def _joins(node: Node, dim: int) -> bool:
    """Whether ``node`` is a concatenation along tokens."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return op_name(node) in ("cat", "concat") and given in (dim, dim - 4)


def _is_returned(node: Node) -> bool:
    return node.op != "placeholder" and any(user.op == "output" for user in node.users)


def unturned(node: Node) -> tuple[Node, int]:
    """What ``node`` [B, H, T, D] is held as, and the dimension that counts tokens there.

    ``x.transpose(1, 2)`` is held as x [B, T, H, D].
    """
    name, source = op_name(node), node.args[0] if node.args else None
    positive = [i % 4 for i in numbers(node, "dims") or ()]
    if isinstance(source, Node) and rank_of(source) == 4:
        if name in ("transpose", "swapaxes", "swapdims") and sorted(positive) == [1, 2]:
            return source, 1
        if name == "permute" and positive == [0, 2, 1, 3]:
            return source, 1
    return node, 2


def turned(new: Node, token_dim: int) -> Node:
    """New tokens as [B, H, T, D]."""
    if token_dim == 2:
        return new
    with new.graph.inserting_after(new):
        out = new.graph.call_method("transpose", (new, 1, 2))
    out.meta = {"example_value": example(new).transpose(1, 2)}
    return out


def _past_and_new(node: Node, dim_of_tokens: int) -> tuple[Node | None, Node, bool] | None:
    """(past, new, past is empty) if ``node`` is cat([past, new]) along tokens."""
    if op_name(node) != "cat" or not _joins(node, dim_of_tokens):
        return None
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    past, new = parts
    if not isinstance(past, Node) or not isinstance(new, Node) or rank_of(new) != 4:
        return None
    past_shape = shape(past)
    if past_shape == (0,):
        return None, new, True
    if past.op != "placeholder":
        return None
    length = past_shape[dim_of_tokens] if past_shape is not None else None
    return past, new, isinstance(length, int) and length == 0


def _sliding_window(joined: Node, dim: int) -> int:
    """w if the cache keeps only the last w - 1 tokens: ``joined[:, :, -w + 1 :, :]``."""
    for user in joined.users:
        if op_name(user) == "getitem" and isinstance(user.args[1], tuple):
            cut = user.args[1][dim] if len(user.args[1]) > dim else None
            if isinstance(cut, slice) and isinstance(cut.start, int) and cut.start < 0:
                return 1 - cut.start
    return 0
