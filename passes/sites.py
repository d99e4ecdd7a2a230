"""An attention site in its phases: found, cached, planned.

A ``Site`` is one attention call as it was found. Where a pass understands how its keys and values
are kept, it is given a ``Cache``; where it is to be rewritten, a ``Planned``. Whatever works on a
later phase takes that phase's record, which holds all that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from arkv_fx.passes.layout import Dims
from arkv_fx.passes.nodes import example, same_size, sizes_of
from torch.fx import Node

from arkv_fx.plan import LayerPlan

DROPOUT = "attention dropout is on: call model.eval()"
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


@dataclass(kw_only=True, eq=False)
class Cache:
    """How the keys and values that an attention reads are kept.

    ``new_k`` and ``new_v`` are the tokens of this call [B, Hkv, T, D], ``fresh`` says that they are
    the first of a sequence; ``nodes`` are needed by nobody once the attention is rewritten;
    ``sliding`` is the attention window in tokens that the graph itself shows, 0 for none.
    ``computed`` is what the model computes from its cache, in order, where keys and values are more
    than an expansion of what is cached. Of several attentions over one cache the ``last`` with a
    query for every new token updates the state: behind the attention ``behind``, where that still
    reads it.
    """

    source: ClassVar[str]
    new_k: Node
    new_v: Node
    fresh: bool
    nodes: list[Node]
    sliding: int = 0
    computed: list[Node] = field(default_factory=list)
    last: bool = True
    behind: Node | None = None

    @property
    def tokens(self) -> Any:
        """How many tokens this call brings, int or SymInt."""
        return sizes_of(self.new_k)[2]


@dataclass(kw_only=True, eq=False)
class Marker(Cache):
    """In an ``ArkvCache``: a marker in the graph, whose input ``handle`` names the sequence."""

    source: ClassVar[str] = "marker"
    handle: Node

    @property
    def node(self) -> Node:
        """The marker."""
        return self.nodes[0]


@dataclass(kw_only=True, eq=False)
class Cat(Cache):
    """By the model's own ``cat`` with its past keys and values; none where a call has no past.

    ``token_dim`` is the dimension of the past that counts tokens.
    """

    source: ClassVar[str] = "cat"
    token_dim: int
    past: tuple[Node | None, Node | None] = (None, None)


@dataclass(kw_only=True, eq=False)
class Buffer(Cache):
    """In two static buffers of the model, of whose dimensions ``token_dim`` counts tokens.

    The new tokens are written from ``start`` on, or at ``positions``.
    """

    source: ClassVar[str] = "buffer"
    token_dim: int
    past: tuple[Node, Node]
    start: Node | int = 0
    positions: Node | None = None


@dataclass(kw_only=True, eq=False)
class Inserted(Cache):
    """Nowhere as yet: the state is ours alone."""

    source: ClassVar[str] = "insert"


@dataclass(eq=False)
class Site:
    """One attention call in a graph.

    ``k`` and ``v`` are what the attention reads (all tokens), [B, Hkv, S, D], looked up through
    views and expansions. ``layout`` says what the leading dimensions of the queries are made of,
    ``out_layout`` those of the output: axes "0" (batch), "1" (kv heads) and "copies".
    ``products`` are the nodes that read keys and values, ``makers`` make a block mask.
    ``source`` is how its cache is kept ("marker", "cat", "buffer", "insert", or "" where it has
    none), also where ``cache`` is None, because that way of keeping could not be followed.
    ``reason`` says why it was left alone, "" while it is a candidate or fused.
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
    products: list[Node] = field(default_factory=list)
    makers: list[Node] = field(default_factory=list)
    source: str = ""
    layer: int | None = None
    reason: str = ""
    lasting: bool = True
    cache: Cache | None = None
    planned: Planned | None = None

    def __post_init__(self) -> None:
        self.products = self.products or [self.node]

    @property
    def name(self) -> str:
        """What a person knows it by."""
        return self.path or f"attention {self.ordinal}"

    @property
    def fused(self) -> bool:
        """Whether the site is rewritten."""
        return self.planned is not None and not self.reason

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
        """Whether it has a cache and only some of the new tokens ask."""
        return self.cache is not None and not same_size(sizes_of(self.q)[-2], self.cache.tokens)

    def keep(self, cache: Cache) -> None:
        """Its keys and values are kept in this way."""
        self.source, self.cache = cache.source, cache

    def refuse(self, reason: str, *, lasting: bool = True) -> None:
        """Leave the site alone, for the first reason found.

        ``lasting`` refusals hold for the sequence: later graphs must not fuse the site either.
        """
        if not self.reason:
            self.reason, self.lasting = reason, lasting

    def row(self) -> dict[str, Any]:
        """The site as a report row."""
        return {
            "path": self.name,
            "layer": self.layer,
            "fused": self.fused,
            "reason": self.reason,
            "source": self.source,
        }


@dataclass(frozen=True, eq=False)
class Planned:
    """A site that can be rewritten, and the state that its cache becomes.

    ``batch`` sequences of ``heads`` kv heads; what is computed from the cache may mix heads, and
    then all of a token are one in the ``plan``. ``layer`` is the number of its cache.
    """

    site: Site
    cache: Cache
    plan: LayerPlan
    layer: int
    batch: int
    heads: int

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        device: torch.device = example(self.cache.new_k).device
        return device


def rewritten(sites: Iterable[Site]) -> list[Planned]:
    """The sites that are rewritten."""
    return [site.planned for site in sites if site.planned is not None and site.fused]


def first_over_caches(sites: Iterable[Site]) -> list[Planned]:
    """The first site of every cache that is rewritten."""
    found: dict[tuple[str, int | None], Planned] = {}
    for planned in rewritten(sites):
        found.setdefault(planned.site.cache_key, planned)
    return list(found.values())
