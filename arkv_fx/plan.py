"""From a configuration and a layer's shape to the exact tensors that the layer will hold."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from math import ceil

import torch

from arkv_fx.calibration import Calibration
from arkv_fx.config import ROUND_TO, ArkvConfig
from arkv_fx.errors import ConfigError
from arkv_fx.formats import Field, Format, get_format
from arkv_fx.registry import forgets
from arkv_fx.scores import Score, make_score

SHORT = 2**15
"""So many tokens of a sequence, their positions from 0 on, int16 can number."""


def limit_of(positions: int | None) -> int | None:
    """``SHORT`` where sequences are meant to have fewer tokens, None where more or nobody knows."""
    return SHORT if positions is not None and positions < SHORT else None


@dataclass(frozen=True)
class TensorSpec:
    """One state tensor; ``shape`` leaves out the batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes per sequence."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Tier:
    """A number of slots per kv head in one storage format."""

    format: str
    slots: int


@dataclass(frozen=True)
class LayerPlan:
    """Everything that fixes the shapes and the behaviour of one layer's state.

    ``window`` and ``sinks`` are tokens of the native ring, ``sliding`` the layer's attention
    window in tokens (0: unlimited), ``dtype`` the model's.

    The keys of a head share a large common part. Formats that quantize keys coarsely store them
    without it: less their ``centre``, the mean key of the first tokens, fixed when the first token
    leaves the ring (KIVI, arXiv 2402.02750, reaches the same by quantizing keys by channel).
    ``balanced``: keys are divided, queries multiplied by a number for each channel, see
    ``arkv_fx.ops.balance``. ``short_positions``: a slot's position is int16 and not int32, so that
    no sequence may have more tokens than ``limit``; who runs a model sees to that.
    """

    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    window: int
    sinks: int
    sliding: int
    tiers: tuple[Tier, ...]
    score: str
    score_options: tuple[tuple[str, float], ...] = ()
    window_format: str = "native"
    balanced: bool = False
    short_positions: bool = False

    @property
    def ring(self) -> int:
        """Slots of the native ring: sinks first, then the window."""
        return self.sinks + self.window

    @property
    def slots(self) -> int:
        """All slots of one kv head."""
        return self.ring + sum(t.slots for t in self.tiers)

    @property
    def limit(self) -> int | None:
        """How many tokens a sequence may have, padding included; None: any number."""
        return SHORT if self.short_positions else None

    @property
    def positions(self) -> int | None:
        """What to tell ``plan_layer`` for positions of the same kind."""
        return 0 if self.short_positions else None

    def policy(self) -> Score:
        """The score that ranks this layer's slots."""
        return make_score(self.score, dict(self.score_options))

    def segments(self) -> list[tuple[Format, int]]:
        """(format, slots) of the ring and of every tier, in state order."""
        return [(get_format(self.window_format), self.ring)] + [
            (get_format(t.format), t.slots) for t in self.tiers
        ]

    @property
    def ahead(self) -> int:
        """On how many tokens behind it hang the statistics of a token that leaves the window."""
        return min(self.policy().ahead, self.window - 1)

    @property
    def centred(self) -> bool:
        """Whether a tier stores keys as differences to the centre."""
        return any(get_format(t.format).key.centred for t in self.tiers)

    def specs(self) -> list[TensorSpec]:
        """All state tensors in the order in which graphs take them; all else knows their names."""
        policy = self.policy()
        out = [
            TensorSpec("count", (), torch.int32),
            TensorSpec("seen", (), torch.int32),
            TensorSpec("bad", (), torch.int32),
        ]
        for field in policy.layer_fields(self.k_dim, self.v_dim):
            out.append(TensorSpec(field.name, (self.heads, field.width), field.dtype))
        if self.balanced:
            out.append(TensorSpec("scale", (self.heads, self.k_dim), torch.float32, fill=1))
        if self.centred:
            out.append(TensorSpec("centre", (self.heads, self.k_dim), torch.float32))
        # One tensor for the slots of all segments: a step updates each with one sweep.
        numbers = torch.int16 if self.short_positions else torch.int32
        out.append(TensorSpec("pos", (self.heads, self.slots), numbers, fill=-1))
        for stat in policy.slot_fields:
            out.append(TensorSpec(stat.name, (self.heads, self.slots), stat.dtype))
        for (_, slots), sides in zip(self.segments(), self.stored, strict=True):
            for name, f in (item for side in sides for item in side.items()):
                out.append(TensorSpec(name, (self.heads, slots, f.width), f.dtype))
        return out

    @cached_property
    def stored(self) -> list[tuple[dict[str, Field], dict[str, Field]]]:
        """The fields of each segment's keys and of its values, by their state tensors' names."""
        out: list[tuple[dict[str, Field], dict[str, Field]]] = []
        for index, (fmt, _) in enumerate(self.segments()):
            segment = "ring" if index == 0 else f"tier{index - 1}"
            keys = fmt.key.fields(self.k_dim, self.dtype)
            values = fmt.value.fields(self.v_dim, self.dtype)
            k = {f"{segment}.k.{f.name}": f for f in keys}
            out.append((k, {f"{segment}.v.{f.name}": f for f in values}))
        return out

    @cached_property
    def places(self) -> dict[str, int]:
        """Where in a list of the state tensors each stands, by its name."""
        return {spec.name: place for place, spec in enumerate(self.specs())}

    def nbytes(self, batch: int = 1) -> int:
        """Exact bytes of the state for ``batch`` sequences."""
        return batch * sum(spec.nbytes for spec in self.specs())

    def full_nbytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Bytes of an uncompressed cache of ``tokens`` tokens in ``dtype`` (the model's)."""
        held = min(tokens, self.sliding) if self.sliding else tokens
        size = (dtype or self.dtype).itemsize
        return batch * held * self.heads * (self.k_dim + self.v_dim) * size

    def to_json(self) -> str:
        """The plan as an operator argument; ``parse`` reads it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        values["tiers"] = [[t.format, t.slots] for t in self.tiers]
        return json.dumps(values, separators=(",", ":"))

    @staticmethod
    @forgets
    @lru_cache(maxsize=1024)
    def parse(text: str) -> LayerPlan:
        """Inverse of ``to_json``."""
        values = json.loads(text)
        values["dtype"] = getattr(torch, values["dtype"])
        values["tiers"] = tuple(Tier(f, n) for f, n in values["tiers"])
        values["score_options"] = tuple((k, v) for k, v in values["score_options"])
        return LayerPlan(**values)


def plan_layer(
    config: ArkvConfig,
    *,
    heads: int,
    k_dim: int,
    v_dim: int,
    dtype: torch.dtype,
    sliding: int = 0,
    oq_ratio: float | None = None,
    share: float = 1.0,
    shares: Sequence[float] = (),
    calibrated: bool = False,
    positions: int | None = None,
) -> LayerPlan:
    """Slots of one layer under the configured budget and what its calibration says.

    A budget that holds less than window and sinks gives these and nothing else: they take more than
    was asked for (``Report`` says so), and hold every token of a text that is no longer.

    Args:
        oq_ratio: this layer's OQ ratio instead of ``config.oq_ratio``.
        share: this layer's budget in units of the configured one.
        shares: those of all layers that share the budget out, see ``lifted``.
        calibrated: share and ratio are by what the layer loses, see ``parted``.
        positions: tokens that sequences are meant to have at most, None if nobody knows; see
            ``limit_of``.

    Raises:
        UnsupportedFormatError: if a format cannot store these head dims.
    """
    for name in (config.window_format, *config.tiers):
        get_format(name).check(k_dim, v_dim)
    # A sliding layer never attends beyond its window, so sinks would expire; its ring takes no
    # more than an eighth of the window, else a short one would leave nothing to compress.
    window = min(config.window, max(1, sliding // 8)) if sliding else config.window
    sinks = 0 if sliding else config.sinks
    ratio = config.oq_ratio if oq_ratio is None else oq_ratio
    balanced = config.balance and not all(get_format(name).key.plain for name in config.tiers)

    def build(counts: Sequence[int]) -> LayerPlan:
        tiers = [Tier(f, n) for f, n in zip(config.tiers, counts, strict=True)]
        return LayerPlan(
            heads, k_dim, v_dim, dtype, window, sinks, sliding, parted(config, tiers, calibrated),
            config.score, config.score_options, config.window_format, balanced,
            limit_of(positions) is not None,
        )  # fmt: skip

    empty = build([0] * len(config.tiers))
    parts = [ratio, 1 - ratio] if len(config.tiers) == 2 else [1.0]
    allowed = allowance(config, empty)
    least = empty.ring if config.budget is not None else empty.nbytes()
    if not sliding:
        share = lifted(share, shares, least / max(1, allowed))
    if config.budget is not None:
        total = round(allowed * share)
        total = min(total, sliding) if sliding else total
        beyond = max(0, total - empty.ring)
        # The paper's rule: Originals = ratio * (budget - window); the rest are Quantized.
        first = round(parts[0] * beyond)
        return build([first, beyond - first] if len(parts) == 2 else [beyond])
    left = int(allowed * share) - least
    if left < 0:
        # So short a window is not worth its bookkeeping: keep all of it as it is.
        return replace(empty, window=sliding) if sliding else empty
    counts = []
    sizes = [
        build([int(i == n) for i in range(len(parts))]).nbytes() - least for n in range(len(parts))
    ]
    beyond = max(0, (sliding or config.context) - empty.ring)
    if oq_ratio is None:
        parts = [enough(left, sizes, beyond + config.round_to, parts[0]), 1.0][-len(parts) :]
    for index, part in enumerate(parts):
        room = (left if index == len(parts) - 1 else int(left * part)) // sizes[index]
        count = room // config.round_to * config.round_to
        counts.append(count)
        left -= count * sizes[index]
    if sliding:  # no more slots than the layer can ever see
        counts = [min(c, beyond) for c in counts]
        counts[-1] = min(counts[-1], beyond - sum(counts[:-1]))
    elif not sum(counts) and room and config.round_to > ROUND_TO:
        warnings.warn(
            f"round_to={config.round_to} leaves nothing of the {room} tokens that the budget holds "
            "beyond the window and the sinks: lower round_to",
            stacklevel=2,
        )
    return build(counts)


def enough(left: int, sizes: Sequence[int], tokens: int, ratio: float) -> float:
    """The share of ``left`` bytes for Originals: ``ratio``, more where slots would stay empty.

    Where every one of ``tokens`` has a slot anyway, what is left over buys precision.

    Args:
        sizes: bytes of a slot, the Originals' first.

    >>> [enough(left, (3, 2), 100, 0.15) for left in (200, 240, 300)]
    [0.15, 0.5, 1.0]
    """
    original, quantized = sizes[0], sizes[-1]
    spare = left - tokens * quantized
    if original <= quantized or spare <= 0:
        return ratio
    return max(ratio, min(1.0, spare // (original - quantized) * original / left))


EVICTION_SHARE = 0.2
"""What ``ArkvConfig.eviction_share`` is where a calibration knows what a layer loses. Chosen on
Moby-Dick and the King James Bible; where all layers have equal budgets, some lose by it."""


def parted(config: ArkvConfig, tiers: Sequence[Tier], calibrated: bool) -> tuple[Tier, ...]:
    """The last tier as two of one format, if the score has two orders.

    Tokens go down from one tier to the next in the order of precision and out of the last one in
    that of eviction, so this gives every order slots of its own. One mixed rank keeps less of
    either: what stands out in one order takes the slots that the other one had for its best.
    """
    *others, last = tiers
    policy = make_score(config.score, dict(config.score_options))
    share = config.eviction_share
    if share is None:
        share = EVICTION_SHARE if calibrated else 1.0
    kept = min(last.slots, ceil(last.slots * share / config.round_to) * config.round_to)
    if not policy.two_orders or kept == last.slots:
        return (*others, last)
    return (*others, replace(last, slots=last.slots - kept), replace(last, slots=kept))


def allowance(config: ArkvConfig, layer: LayerPlan) -> int:
    """What a layer of such a shape is given: tokens under ``config.budget``, else bytes."""
    if config.compression is not None:
        return int(layer.full_nbytes(config.context) / config.compression)
    given = config.bytes if config.budget is None else config.budget
    if given is None:
        raise ConfigError("give one of compression, budget and bytes: none of them is set")
    return given


def lifted(share: float, shares: Sequence[float], least: float) -> float:
    """A layer's share where no layer may have less than ``least``; the sum stays what it was.

    Layers below it are lifted to it, and the others give: each the same part of what it has beyond
    it. If their sum does not reach ``least`` for every layer, all have that.

    >>> [lifted(share, (0.5, 0.5, 2.0), 0.8) for share in (0.5, 2.0)]
    [0.8, 1.4]
    """
    if not shares or min(shares) >= least:
        return share
    spare = sum(shares) - least * len(shares)
    beyond = sum(max(0.0, each - least) for each in shares)
    return least + max(0.0, share - least) * max(0.0, spare) / beyond if beyond else least


def sized(config: ArkvConfig, layer: LayerPlan, size: float, tokens: int) -> ArkvConfig:
    """The configuration whose budget is ``size`` times the full cache of ``tokens`` tokens.

    In 16 bits, whatever the model's dtype: a calibration is of weights, not of a dtype.
    """
    if config.budget is not None:
        return config.replace(budget=max(round(size * tokens), config.window + config.sinks))
    full = layer.full_nbytes(tokens, dtype=torch.bfloat16)
    return config.replace(bytes=max(1, int(size * full)))


def size_of(config: ArkvConfig, layer: LayerPlan) -> float:
    """Inverse of ``sized``: a layer's budget as a fraction of its full cache at ``context``."""
    if config.budget is not None:
        return config.budget / config.context
    return allowance(config, layer) / layer.full_nbytes(config.context, dtype=torch.bfloat16)


def plan_calibrated(
    config: ArkvConfig, calibration: Calibration | None, layer: int, windows: Sequence[int],
    *, heads: int, k_dim: int, v_dim: int, dtype: torch.dtype, sliding: int = 0,
    positions: int | None = None,
) -> LayerPlan:  # fmt: skip
    """``plan_layer`` of what a calibration, solved for this budget, gives the layer.

    ``windows`` are the attention windows of all layers, 0 for those that share the budget out.
    """
    plan = partial(
        plan_layer, config, heads=heads, k_dim=k_dim, v_dim=v_dim, dtype=dtype, positions=positions
    )
    if calibration is None or calibration.row(layer) is None:
        return plan(sliding=sliding)
    unit = "bytes" if config.budget is None else "tokens"
    solved = calibration.at(size_of(config, plan(share=0.0)), unit)
    row = solved.row(layer)
    assert row is not None
    return plan(
        sliding=sliding,
        oq_ratio=row.oq_ratio,
        share=row.share,
        shares=solved.shares(windows),
        calibrated=calibration.mode in ("output", "measured"),
    )
