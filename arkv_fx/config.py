"""What a user may ask for: one frozen, validated configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from arkv_fx.calibration import MODES
from arkv_fx.errors import ConfigError, UnknownOptionError
from arkv_fx.formats import FORMATS, get_format
from arkv_fx.options import Real, Whole, in_a_row, refuse, require_one_of, require_type
from arkv_fx.registry import Registry
from arkv_fx.scores import SCORES, make_score

PAPER_TAUS = (7.774380648611771, 5.407015096778621, 5.527702582901318)
"""tau1 (entropy), tau2 (variance), tau3 (kurtosis) as published with arXiv 2603.08727."""

ROUND_TO = 8

NUMBERS: dict[str, Whole | Real] = {
    "compression": Real(1),
    "context": Whole(1, unit=" of tokens"),
    "budget": Whole(1, unit=" of tokens"),
    "bytes": Whole(0, most=2**63 - 1, above=True, unit=" of bytes"),
    "window": Whole(1, unit=" of tokens"),
    "sinks": Whole(0, unit=" of tokens"),
    "oq_ratio": Real(0, 1),
    "eviction_share": Real(0, 1),
    "round_to": Whole(1, unit=" of slots"),
}
"""What the options that are numbers may be."""
TIERS = "one or two format names in a row, as ('int8', 'int4')"
TAUS = "three numbers > 0"


@dataclass(frozen=True)
class ArkvConfig:
    """Size, formats and ranking of the cache. Exactly one of the three budgets is in force.

    Args:
        compression: bytes of the full cache in the model's dtype at ``context`` tokens, divided
            by the bytes that our cache may hold (its scales, scores and positions included).
        context: tokens at which ``compression`` is meant, and at which a calibration is solved. For
            texts of 32768 tokens and more it has to be as large, or the model's
            ``max_position_embeddings`` is: below, positions are kept in two bytes.
        budget: tokens kept per kv head and layer, sinks and window included (the paper's budget).
        bytes: bytes kept per layer and sequence.
        tiers: storage formats of the tiers beyond the window, most precise first: ``(Original,
            Quantized)`` or one format for all. See ``arkv_fx.formats.FORMATS``.
        balance: divide each key channel by one number and multiply the query's by it, chosen at the
            first prompt, so that no channel takes the codes' range from the others; logits stay
            what they are. Where no tier quantizes keys there is nothing to do.
        window: most recent tokens, always in the model's dtype.
        window_format: "native", or "bf16" to hold window and sinks of a float32 model in two bytes.
        sinks: first tokens of a sequence, always in the model's dtype.
        oq_ratio: share of Originals where no calibration gives one per layer: a share of tokens
            under ``budget``, of bytes under the other two, where they are more if ``context``
            tokens would leave slots empty.
        eviction_share: part of the last format's slots whose tokens compete in the score's order of
            eviction; in the others it is the order of precision. Attention knows what the text is
            about and forgets what nobody asked for yet, so most slots go by it and some do not.
            None: a fifth where a calibration knows what the layer loses, else all. Nothing is
            parted where a score has one order only.
        score: name in ``arkv_fx.scores.SCORES``; ``score_options`` are its parameters.
        calibration: how ``arkv_fx.calibrate`` finds OQ ratios and each layer's share of the bytes:
            ``"output"`` by the error of each layer's attention under several budgets, in one
            prefill; ``"measured"`` by the divergence of the predictions, a forward for each;
            ``"normalised"`` and ``"paper"`` derive ratios from attention statistics, all layers
            keeping equal budgets.
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
    balance: bool = True
    window: int = 32
    window_format: str = "native"
    sinks: int = 4
    oq_ratio: float = 0.15
    eviction_share: float | None = None
    score: str = "combined"
    score_options: tuple[tuple[str, float], ...] = ()
    calibration: str = "output"
    taus: tuple[float, float, float] = PAPER_TAUS
    round_to: int = ROUND_TO

    def __post_init__(self) -> None:
        sizes = ("compression", "budget", "bytes")
        given = [n for n in sizes if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"give one of compression, budget and bytes, not {given}")
        if not given:
            self._set("compression", 4.0)
        for name, kind in NUMBERS.items():
            if name not in (*sizes, "eviction_share") or getattr(self, name) is not None:
                self._set(name, kind.read(name, getattr(self, name)))
        self._check_sizes()
        self._set("tiers", in_a_row("tiers", self.tiers, TIERS))
        if not 1 <= len(self.tiers) <= 2:
            refuse("tiers", self.tiers, TIERS)
        for name in self.tiers:
            require_type("tiers", name, str, TIERS)
            try:
                get_format(name)
            except UnknownOptionError as error:
                raise UnknownOptionError(f"tiers={self.tiers!r}: {error}") from None
        self._set("taus", _taus(self.taus))
        require_type("balance", self.balance, bool, "True or False")
        require_one_of("calibration", self.calibration, MODES)
        plain = [f.name for f in FORMATS.values() if f.key.plain and f.value.plain]
        require_one_of("window_format", self.window_format, plain)
        self._set("score_options", _pairs(self.score_options))
        require_type("score", self.score, str, f"one of {', '.join(SCORES)}")
        make_score(self.score, dict(self.score_options))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        """Refuse options that contradict each other."""
        least = self.window + self.sinks
        if self.budget is not None and self.budget < least:
            refuse("budget", self.budget, f"at least window + sinks = {least} tokens")
        if self.budget is not None and self.round_to > max(self.budget, ROUND_TO):
            refuse("round_to", self.round_to, f"no more than budget={self.budget}")

    @classmethod
    def paper(cls, budget: int = 1024, **options: Any) -> ArkvConfig:
        """The published method: native and fp8 tiers, its score, no sinks, a token budget."""
        settings: dict[str, Any] = {
            "budget": budget,
            "tiers": ("native", "fp8"),
            "sinks": 0,
            "balance": False,
            "score": "paper",
            "calibration": "paper",
            "oq_ratio": 0.75,
            "round_to": 1,
        }
        return cls.make({**settings, **options})

    def smallest(self, tokens: int) -> ArkvConfig:
        """The window and nothing else, for measuring runs that make no use of their state.

        ``tokens`` are those that come. Layers are planned with positions as large as they will be.
        """
        return ArkvConfig(
            budget=self.window, context=max(self.most_tokens, tokens), window=self.window, sinks=0,
            tiers=("native",), score="mass",
        )  # fmt: skip

    @property
    def most_tokens(self) -> int:
        """The longest text that it speaks of."""
        return max(self.context, self.budget or 0)

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> ArkvConfig:
        """Build from a mapping (``torch.compile`` options, JSON); unknown names are refused.

        Raises:
            UnknownOptionError: naming the unknown options and listing the valid ones.
        """
        require_type("options", options, Mapping, "a mapping of names to values")
        if "preset" in options:
            rest = {k: v for k, v in options.items() if k != "preset"}
            return preset(options["preset"], **rest)
        cls._require_known(options)
        return cls(**options)

    @classmethod
    def _require_known(cls, names: Iterable[Any]) -> None:
        known = [f.name for f in fields(cls)]
        unknown = sorted(str(name) for name in names if name not in known)
        if unknown:
            raise UnknownOptionError(f"unknown option {', '.join(unknown)}; known: {known}")

    def replace(self, **changes: Any) -> ArkvConfig:
        """A copy with changes; giving one budget clears the other two."""
        self._require_known(changes)
        budgets = ("compression", "budget", "bytes")
        if any(changes.get(name) is not None for name in budgets):
            changes = {**dict.fromkeys(budgets), **changes}
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; ``ArkvConfig.make`` reads them back."""
        return asdict(self)


def _taus(taus: Any) -> tuple[float, ...]:
    found = in_a_row("taus", taus, TAUS)
    try:
        numbers = tuple(Real(0, above=True).read("taus", tau) for tau in found)
    except ConfigError:
        refuse("taus", found, TAUS)
    return numbers if len(numbers) == 3 else refuse("taus", found, TAUS)


def _pairs(options: Any) -> tuple[tuple[str, float], ...]:
    """Options of a score by name, sorted."""
    allowed = "numbers by name, as {'decay': 0.9}"
    pairs = list(options.items()) if isinstance(options, Mapping) else options
    found = []
    for pair in in_a_row("score_options", pairs, allowed):
        try:
            name, value = pair
        except (TypeError, ValueError):
            refuse("score_options", options, allowed)
        if not isinstance(name, str):
            refuse("score_options", options, allowed)
        number = int(value) if isinstance(value, bool) else value  # switches are 0 and 1
        read = Real().read(f"score_options {name}", number)
        found.append((name, number if isinstance(number, int) else read))
    if len(dict(found)) < len(found):
        refuse("score_options", options, f"{allowed}, each name once")
    return tuple(sorted(found))


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
