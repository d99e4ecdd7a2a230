"""What the passes share while they work on one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from arkv_fx.passes.sites import Planned, Site, first_over_caches, rewritten
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


class Applied(NamedTuple):
    """A pass that ran: how many sites or nodes it acted on, and its time in seconds."""

    name: str
    matches: int
    seconds: float


@dataclass
class Context:
    """Input of the passes (config, calibration, sliding windows) and what they find (sites).

    ``sliding`` is the attention window of each layer in tokens, 0 for full attention; ``probe``,
    if given, is called at run time with (layer, q, k, v, mask, scale) of every fused site, and
    ``stand_in`` in place of ``arkv::attend``, with the layer before the operator's arguments;
    ``left_alone`` names the caches (source, layer) that an earlier graph kept out of our state,
    ``whole`` the layers that must stay in full precision, with the reason; ``positions`` how many
    tokens a sequence has at most whose cache's owner counts them, None if that is not known;
    ``insertion``, if given, asks for a state where the model has no cache of its own;
    ``first`` says that the model's own buffers are empty. ``trace`` has an entry for each pass that
    ran; what the passes find is new in every ``dataclasses.replace``.
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
    positions: int | None = None
    sites: list[Site] = field(default_factory=list, init=False)
    state_inputs: list[list[Node]] = field(default_factory=list, init=False)
    trace: list[Applied] = field(default_factory=list, init=False)

    @property
    def caches(self) -> list[Planned]:
        """The first site of every cache that is rewritten."""
        return first_over_caches(self.sites)

    @property
    def fused(self) -> list[Planned]:
        """The sites that are rewritten."""
        return rewritten(self.sites)

    @property
    def products(self) -> list[Node]:
        """All nodes that read keys or values."""
        return [node for site in self.sites for node in site.products]

    def rows(self) -> list[dict[str, Any]]:
        """All sites as report rows."""
        return [s.row() for s in self.sites]
