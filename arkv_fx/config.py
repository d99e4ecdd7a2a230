"""What a user may ask for: one frozen, validated configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from arkv_fx.calibration import MODES
from arkv_fx.errors import ConfigError, UnknownOptionError
from arkv_fx.formats import FORMATS, get_format
from arkv_fx.registry import Registry
from arkv_fx.scores import make_score

PAPER_TAUS = (7.774380648611771, 5.407015096778621, 5.527702582901318)
"""tau1 (entropy), tau2 (variance), tau3 (kurtosis) as published with arXiv 2603.08727."""


@dataclass(frozen=True)
class ArkvConfig:
    """Size, formats and ranking of the cache. Exactly one of the three budgets is in force.

    Args:
        compression: bytes of the full cache in the model's dtype at ``context`` tokens, divided
            by the bytes that our cache may hold (its scales, scores and positions included).
        context: tokens at which ``compression`` is meant.
        budget: tokens kept per kv head and layer, sinks and window included (the paper's budget).
        bytes: bytes kept per layer and sequence.
        tiers: storage formats of the tiers beyond the window, most precise first: ``(Original,
            Quantized)`` or one format for all. See ``arkv_fx.formats.FORMATS``.
        window: most recent tokens, always in the model's dtype.
        window_format: "native", or "bf16" to hold window and sinks of a float32 model in two bytes.
        sinks: first tokens of a sequence, always in the model's dtype.
        oq_ratio: share of Originals where no calibration gives one per layer: a share of tokens
            under ``budget``, of bytes under the other two.
        score: name in ``arkv_fx.scores.SCORES``; ``score_options`` are its parameters.
        calibration: how ``arkv_fx.calibrate`` finds OQ ratios: ``"measured"`` tries budgets and
            ratios on each layer alone and gives each its share of the bytes, ``"normalised"`` and
            ``"paper"`` derive ratios from attention statistics, all layers keeping equal budgets.
        taus: the paper's exponents of entropy, variance and kurtosis.
        round_to: slot counts are rounded down to a multiple of this, so that layers share shapes.

    Raises:
        ConfigError: naming the option, its value and what is allowed.

    Example:
        >>> from arkv_fx import ArkvConfig
        >>> ArkvConfig(compression=8, context=32768).tiers
        ('k8v4', 'k4v3')
        >>> ArkvConfig(budget=1024).replace(bytes=65536).budget is None
        True
        >>> ArkvConfig.paper(budget=512).tiers
        ('native', 'fp8')
    """

    compression: float | None = None
    context: int = 4096
    budget: int | None = None
    bytes: int | None = None
    tiers: tuple[str, ...] = ("k8v4", "k4v3")
    window: int = 32
    window_format: str = "native"
    sinks: int = 4
    oq_ratio: float = 0.15
    score: str = "combined"
    score_options: tuple[tuple[str, float], ...] = ()
    calibration: str = "measured"
    taus: tuple[float, float, float] = PAPER_TAUS
    round_to: int = 8

    def __post_init__(self) -> None:
        given = [n for n in ("compression", "budget", "bytes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"give one of compression, budget and bytes, not {given}")
        if not given:
            object.__setattr__(self, "compression", 4.0)
        object.__setattr__(self, "tiers", tuple(self.tiers))
        options = self.score_options
        pairs = options.items() if isinstance(options, Mapping) else options
        object.__setattr__(self, "score_options", tuple(sorted((str(k), v) for k, v in pairs)))
        _require(self.compression is None or self.compression >= 1, "compression", self, ">= 1")
        _require(self.context >= 1, "context", self, ">= 1 token")
        _require(self.window >= 1, "window", self, ">= 1 token")
        _require(self.sinks >= 0, "sinks", self, ">= 0 tokens")
        _require(0 <= self.oq_ratio <= 1, "oq_ratio", self, "between 0 and 1")
        _require(self.round_to >= 1, "round_to", self, ">= 1")
        _require(1 <= len(self.tiers) <= 2, "tiers", self, "one or two format names")
        _require(len(self.taus) == 3 and min(self.taus) > 0, "taus", self, "three numbers > 0")
        _require(self.bytes is None or self.bytes > 0, "bytes", self, "> 0")
        _require(
            self.budget is None or self.budget >= self.window + self.sinks,
            "budget",
            self,
            f"at least window + sinks = {self.window + self.sinks} tokens",
        )
        if self.calibration not in MODES:
            raise UnknownOptionError(
                f"calibration={self.calibration!r}: choose 'measured', 'normalised' or 'paper'"
            )
        plain = [f.name for f in FORMATS.values() if f.key.plain and f.value.plain]
        if self.window_format not in plain:
            choices = " or ".join(map(repr, plain))
            raise UnknownOptionError(f"window_format={self.window_format!r}: choose {choices}")
        for name in self.tiers:
            get_format(name)
        make_score(self.score, dict(self.score_options))

    @classmethod
    def paper(cls, budget: int = 1024, **options: Any) -> ArkvConfig:
        """The published method: native and fp8 tiers, its score, no sinks, a token budget."""
        settings: dict[str, Any] = {
            "budget": budget,
            "tiers": ("native", "fp8"),
            "sinks": 0,
            "score": "paper",
            "calibration": "paper",
            "oq_ratio": 0.75,
            "round_to": 1,
        }
        return cls.make({**settings, **options})

    @classmethod
    def smallest(cls, window: int) -> ArkvConfig:
        """A window and nothing else, for measuring runs that make no use of their state."""
        return cls(budget=window, window=window, sinks=0, tiers=("native",), score="mass")

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> ArkvConfig:
        """Build from a mapping (``torch.compile`` options, JSON); unknown names are refused.

        Raises:
            UnknownOptionError: naming the unknown options and listing the valid ones.
        """
        if "preset" in options:
            rest = {k: v for k, v in options.items() if k != "preset"}
            return preset(str(options["preset"]), **rest)
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UnknownOptionError(f"unknown option {', '.join(unknown)}; known: {known}")
        settings = dict(options)
        for name in ("tiers", "taus"):
            if isinstance(settings.get(name), list):
                settings[name] = tuple(settings[name])
        if isinstance(settings.get("score_options"), list):
            settings["score_options"] = tuple((k, v) for k, v in settings["score_options"])
        return cls(**settings)

    def replace(self, **changes: Any) -> ArkvConfig:
        """A copy with changes; giving one budget clears the other two."""
        budgets = ("compression", "budget", "bytes")
        if any(changes.get(name) is not None for name in budgets):
            changes = {**dict.fromkeys(budgets), **changes}
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; ``ArkvConfig.make`` reads them back."""
        return asdict(self)


def _require(ok: bool, name: str, config: ArkvConfig, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={getattr(config, name)!r}: must be {allowed}")


@dataclass(frozen=True)
class Preset:
    """A configuration by name: ``make(**options)`` gives it with some options changed."""

    name: str
    make: Callable[..., ArkvConfig]


PRESETS: Registry[Preset] = Registry(
    "preset",
    (
        Preset("default", lambda **options: ArkvConfig.make(options)),
        Preset("paper", ArkvConfig.paper),
    ),
)


def preset(name: str, **options: Any) -> ArkvConfig:
    """The configuration named ``name`` with some options changed.

    Raises:
        UnknownOptionError: for an unknown preset or option.

    Example:
        >>> import arkv_fx
        >>> arkv_fx.preset("paper", budget=512).score
        'paper'
    """
    return PRESETS.find(name).make(**options)
