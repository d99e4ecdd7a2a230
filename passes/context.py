"""What the passes share while they work on one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arkv_fx.passes.site import Site, first_over_caches
from torch import Tensor
from torch.fx import Node

from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig

Probe = Callable[..., None]
StandIn = Callable[..., Tensor]


@dataclass
class Insertion:
    """A state is to be inserted where the model knows none.

    ``constants`` are the values of parameters and buffers by placeholder, ``bounds`` the largest
    value of each size's symbol, ``fresh`` whether the graph is for the first call of a sequence,
    ``columns`` the most tokens that biases by position must reach over; ``tokens``, found by the
    passes, is the symbol of the number of new tokens.
    """

    constants: Mapping[str, Tensor]
    bounds: Mapping[Any, int]
    fresh: bool
    columns: int = 0
    tokens: Any = None


@dataclass
class Context:
    """Input of the passes (config, calibration, sliding windows) and what they find (sites).

    ``sliding`` is the attention window of each layer in tokens, 0 for full attention; ``probe``,
    if given, is called at run time with (layer, q, k, v, mask, scale) of every fused site, and
    ``stand_in`` in place of ``arkv::attend``, with the layer before the operator's arguments;
    ``left_alone`` names the caches (source, layer) that an earlier graph kept out of our state,
    ``whole`` the layers that must stay in full precision, with the reason;
    ``insertion``, if given, asks for a state where the model has no cache of its own;
    ``first`` says that the model's own buffers are empty.
    """

    config: ArkvConfig
    calibration: Calibration | None = None
    sliding: Sequence[int] = ()
    probe: Probe | None = None
    stand_in: StandIn | None = None
    left_alone: frozenset[tuple[str, int | None]] = frozenset()
    whole: Mapping[int, str] = field(default_factory=dict)
    insertion: Insertion | None = None
    first: bool = False
    sites: list[Site] = field(default_factory=list)
    state_inputs: list[list[Node]] = field(default_factory=list)

    @property
    def caches(self) -> list[Site]:
        """The first site of every cache that is rewritten."""
        return first_over_caches(self.sites)

    @property
    def fused(self) -> list[Site]:
        """The sites that are rewritten."""
        return [s for s in self.sites if s.fused]

    @property
    def products(self) -> list[Node]:
        """All nodes that read keys or values."""
        return [node for site in self.sites for node in site.products]

    def rows(self) -> list[dict[str, Any]]:
        """All sites as report rows."""
        return [s.row() for s in self.sites]
