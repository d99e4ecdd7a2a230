"""An attention site: what the passes learn about one attention call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from arkv_fx.plan import LayerPlan


@dataclass
class Site:
    """One attention call in a graph, filled in by pass after pass.

    ``k`` and ``v`` are what the attention reads (all tokens), ``new_k`` and ``new_v`` the tokens
    of this call [B, Hkv, T, D]; ``source`` is how its cache is kept: "marker", "cat", "insert" or
    "".
    ``reason`` says why it was left alone, "" while it is a candidate or fused.
    """

    node: Node
    ordinal: int
    path: str
    q: Node
    k: Node
    v: Node
    mask: Node | None
    is_causal: bool
    scale: float | None
    grouped: bool = False
    source: str = ""
    reason: str = ""
    lasting: bool = True
    new_k: Node | None = None
    new_v: Node | None = None
    layer: int | None = None
    handle: Node | None = None
    past: tuple[Node | None, Node | None] = (None, None)
    fresh: bool = False
    sliding: int = 0
    batch: int = 0
    heads: int = 0
    plan: LayerPlan | None = None
    cache_nodes: list[Node] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        """Whether the site is rewritten."""
        return self.plan is not None and not self.reason

    def refuse(self, reason: str, *, lasting: bool = True) -> None:
        """Leave the site alone, for the first reason found.

        ``lasting`` refusals hold for the sequence: later graphs must not fuse the site either.
        """
        if not self.reason:
            self.reason, self.lasting = reason, lasting

    def row(self) -> dict[str, Any]:
        """The site as a report row."""
        return {
            "path": self.path or f"attention {self.ordinal}",
            "layer": self.layer,
            "fused": self.fused,
            "reason": self.reason,
            "source": self.source,
        }
