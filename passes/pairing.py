"""Find the keys and values behind views and expansions, and what pairs them with the queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arkv_fx.passes.layout import Axis, Dims, follow, names, origin_dims, size_of
from arkv_fx.passes.nodes import rank_of, same_size, shape, sizes_of
from arkv_fx.passes.sites import Site
from torch.fx import Node


def look_through(
    site: Site, *, k_token: int = -2, grouped: bool = False, probabilities: Node | None = None
) -> None:
    """Set the site's ``k`` and ``v`` to what is behind them, and its layouts; or refuse it.

    Args:
        k_token: the dimension of ``k`` that counts tokens, -2 or -1; ``v``'s is -2.
        grouped: ``enable_gqa``: query heads share kv heads without an expansion.
        probabilities: what is multiplied with ``v`` where that is its own product.
    """
    keys = follow(site.k, lambda origin, dims: _is_cacheable(origin, dims, k_token))
    values = follow(site.v, lambda origin, dims: _is_cacheable(origin, dims, -2))
    if keys is None or values is None:
        found = shape(site.k if keys is None else site.v)
        site.refuse(
            f"keys or values of shape {_text(found)} are not [batch, kv heads, tokens, head "
            "dim], nor views of it"
        )
        return
    queries = sizes_of(site.q)
    left = queries if probabilities is None else sizes_of(probabilities)
    # Where the origins do not pair, what is read may: then it is computed from the cache.
    read = (site.k, origin_dims(site.k)), (site.v, origin_dims(site.v))
    for (k, k_dims), (v, v_dims) in ((keys, values), read):
        layout = _pair(queries, k_dims[:-2], grouped)
        other = _pair(left, v_dims[:-2], grouped)
        if layout is not None and other is not None and _flat(layout) == _flat(other):
            site.k, site.v, site.layout, site.out_layout = k, v, layout, other
            return
        if k_token != -2 or rank_of(site.k) != 4:
            break
    site.refuse(
        "keys and values, or queries and keys, differ in how batch and heads are laid out: "
        f"queries {_text(queries)}, keys {names(keys[1])}, values {names(values[1])}"
    )


def _text(sizes: Sequence[Any] | None) -> str:
    return "?" if sizes is None else str([*sizes])


def _is_cacheable(origin: Node, dims: Dims, token: int) -> bool:
    """Whether an origin is [batch, kv heads, tokens, head dim] and its axes are where they belong.

    Sizes of 1 tell nothing of their axis, so they will do anywhere.
    """
    if rank_of(origin) != 4 or len(dims) < 2:
        return False
    found = names(dims)
    if found[token] not in ((), ("2",)) or found[-3 - token] not in ((), ("3",)):
        return False
    outer = [name for dim in found[:-2] for name in dim]
    return set(outer) <= {"0", "1", "copies"} and len({*outer} - {"copies"}) == len(
        [name for name in outer if name != "copies"]
    )


def _pair(queries: Sequence[Any], dims: Dims, grouped: bool) -> Dims | None:
    """The axes of the queries' leading dimensions, from those of keys or values."""
    sizes = queries[:-2]
    dims = ((),) * (len(sizes) - len(dims)) + dims
    if len(dims) != len(sizes):
        return None
    out: list[tuple[Axis, ...]] = []
    for index, (size, dim) in enumerate(zip(sizes, dims, strict=True)):
        held = size_of(dim)
        heads = index == len(sizes) - 1
        if same_size(held, size):
            out.append(dim)
        elif same_size(held, 1) or (grouped and heads and _divides(held, size)):
            out.append((*dim, Axis("copies", size // held)))
        else:
            return None
    return tuple(out)


def _flat(layout: Dims) -> list[str]:
    return [name for dim in names(layout) for name in dim]


def _divides(part: Any, whole: Any) -> bool:
    return isinstance(part, int) and isinstance(whole, int) and whole % part == 0
