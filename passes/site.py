"""An attention site: what the passes learn about one attention call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from arkv_fx.passes.layout import Axis, Dims, follow, names, origin_dims, size_of
from arkv_fx.passes.nodes import same_size, shape
from torch.fx import Node

from arkv_fx.plan import LayerPlan

HIDES = -1e4
"""A logit of this or less is masked: whatever the others are, nothing is left of it."""


@dataclass(frozen=True)
class Bias:
    """What masks the logits or is added to them before the softmax.

    ``node`` broadcasts to logits whose leading dimensions are ``layout`` and whose last two are
    queries and keys. A bool keeps a logit where it is True (where it is False, if ``drop``), a
    number is multiplied by ``factor`` and added.
    """

    node: Node
    layout: Dims
    factor: float = 1.0
    drop: bool = False


@dataclass
class Site:
    """One attention call in a graph, filled in by pass after pass.

    ``k`` and ``v`` are what the attention reads (all tokens), [B, Hkv, S, D], looked up through
    views and expansions; ``new_k`` and ``new_v`` the tokens of this call [B, Hkv, T, D]; ``source``
    is how its cache is kept: "marker", "cat", "buffer", "insert" or "". ``layout`` says what the
    leading dimensions of the queries are made of, ``out_layout`` those of the output: axes "0"
    (batch), "1" (kv heads) and "copies". ``past`` are the model's own past keys and values, whose
    dimension ``token_dim`` counts tokens; into a buffer the new tokens are written from
    ``start`` on, or at ``positions``.
    ``computed`` is what the model computes from its cache, in order, where keys and values are more
    than an expansion of what is cached; ``makers`` make a block mask. Of several attentions over
    one cache the ``last`` with a query for every new token updates the state, ``behind`` the last
    of all. ``products`` are the nodes that read keys and values. ``reason`` says why it was left
    alone, "" while it is a candidate or fused.
    """

    node: Node
    ordinal: int
    path: str
    q: Node
    k: Node
    v: Node
    is_causal: bool = False
    scale: float | None = None
    softcap: float = 0.0
    sinks: Node | None = None
    biases: list[Bias] = field(default_factory=list)
    layout: Dims = ()
    out_layout: Dims = ()
    source: str = ""
    reason: str = ""
    lasting: bool = True
    new_k: Node | None = None
    new_v: Node | None = None
    layer: int | None = None
    handle: Node | None = None
    past: tuple[Node | None, Node | None] = (None, None)
    token_dim: int = 2
    start: Node | int = 0
    positions: Node | None = None
    fresh: bool = False
    sliding: int = 0
    batch: int = 0
    heads: int = 0
    plan: LayerPlan | None = None
    cache_nodes: list[Node] = field(default_factory=list)
    computed: list[Node] = field(default_factory=list)
    makers: list[Node] = field(default_factory=list)
    last: bool = True
    behind: Site | None = None
    products: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.products = self.products or [self.node]

    @property
    def fused(self) -> bool:
        """Whether the site is rewritten."""
        return self.plan is not None and not self.reason

    @property
    def mask(self) -> Node | None:
        """The first of what masks or biases the logits, None if nothing does."""
        return self.biases[0].node if self.biases else None

    @property
    def cache_key(self) -> tuple[str, int | None]:
        """What tells its cache from others: several sites may read the cache of one layer."""
        return (self.source, self.layer if self.source == "marker" else self.ordinal)

    @property
    def partial(self) -> bool:
        """Whether only some of the new tokens ask."""
        return not same_size((shape(self.q) or ())[-2], (shape(self.new_k) or (0,) * 3)[2])

    def refuse(self, reason: str, *, lasting: bool = True) -> None:
        """Leave the site alone, for the first reason found.

        ``lasting`` refusals hold for the sequence: later graphs must not fuse the site either.
        """
        if not self.reason:
            self.reason, self.lasting = reason, lasting

    def look_through(
        self, *, k_token: int = -2, grouped: bool = False, probabilities: Node | None = None
    ) -> None:
        """Find the keys and values behind views and expansions, and what pairs them with queries.

        Args:
            k_token: the dimension of ``k`` that counts tokens, -2 or -1; ``v``'s is -2.
            grouped: ``enable_gqa``: query heads share kv heads without an expansion.
            probabilities: what is multiplied with ``v`` where that is its own product.
        """
        keys = follow(self.k, lambda origin, dims: _is_cacheable(origin, dims, k_token))
        values = follow(self.v, lambda origin, dims: _is_cacheable(origin, dims, -2))
        if keys is None or values is None:
            found = shape(self.k if keys is None else self.v)
            self.refuse(
                f"keys or values of shape {_text(found)} are not [batch, kv heads, tokens, head "
                "dim], nor views of it"
            )
            return
        queries = shape(self.q) or ()
        left = shape(probabilities) or queries
        # Where the origins do not pair, what is read may: then it is computed from the cache.
        read = (self.k, origin_dims(self.k)), (self.v, origin_dims(self.v))
        for (k, k_dims), (v, v_dims) in ((keys, values), read):
            layout = _pair(queries, k_dims[:-2], grouped)
            other = _pair(left, v_dims[:-2], grouped)
            if layout is not None and other is not None and _flat(layout) == _flat(other):
                self.k, self.v, self.layout, self.out_layout = k, v, layout, other
                return
            if k_token != -2 or len(shape(self.k) or ()) != 4:
                break
        self.refuse(
            "keys and values, or queries and keys, differ in how batch and heads are laid out: "
            f"queries {_text(queries)}, keys {names(keys[1])}, values {names(values[1])}"
        )

    def row(self) -> dict[str, Any]:
        """The site as a report row."""
        return {
            "path": self.path or f"attention {self.ordinal}",
            "layer": self.layer,
            "fused": self.fused,
            "reason": self.reason,
            "source": self.source,
        }


def first_over_caches(sites: Iterable[Site]) -> list[Site]:
    """The first site of every cache that is rewritten."""
    found: dict[tuple[str, int | None], Site] = {}
    for site in sites:
        if site.fused:
            found.setdefault(site.cache_key, site)
    return list(found.values())


def _text(sizes: Sequence[Any] | None) -> str:
    return "?" if sizes is None else str([*sizes])


def _is_cacheable(origin: Node, dims: Dims, token: int) -> bool:
    """Whether an origin is [batch, kv heads, tokens, head dim] and its axes are where they belong.

    Sizes of 1 tell nothing of their axis, so they will do anywhere.
    """
    if len(shape(origin) or ()) != 4 or len(dims) < 2:
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
