"""The methods to compare: a name and a compression make a configuration of the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ConfigError, UnknownOptionError
from arkv_fx.huggingface.layers import sliding_windows


@dataclass(frozen=True)
class FullCache:
    """What a full cache in bf16 takes: ``layers`` are bytes per token, ``windows`` tokens.

    ``exact`` is "bf16" for a float32 model, else "native".
    """

    layers: tuple[int, ...]
    windows: tuple[int, ...]
    exact: str = "native"

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> FullCache:
        """Measure a model that is not transformed, by a forward of one token."""
        device = next(model.parameters()).device
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
        pairs = [(x.keys, x.values) for x in layers if isinstance(getattr(x, "keys", None), Tensor)]
        if not pairs:
            raise ConfigError(f"{type(model).__name__} holds no keys and values in its cache")
        size = torch.bfloat16.itemsize
        exact = "bf16" if pairs[0][0].dtype == torch.float32 else "native"
        sizes = tuple((k.numel() + v.numel()) * size for k, v in pairs)
        return cls(sizes, tuple(sliding_windows(model)), exact)

    def per_layer(self, context: int) -> int:
        """Bytes of the largest layer at ``context`` tokens, sliding windows ignored."""
        return context * max(self.layers)

    def nbytes(self, context: int) -> int:
        """Bytes of all layers of one sequence at ``context`` tokens."""
        windows = self.windows or (0,) * len(self.layers)
        return sum(
            size * (min(context, window) if window else context)
            for size, window in zip(self.layers, windows, strict=False)
        )


@dataclass(frozen=True)
class Setting:
    """What a method is asked for: prompt tokens, later tokens, bytes per layer and sequence.

    ``exact`` is the format of what a method holds unquantized: bf16 for a float32 model, whose
    bytes are then those of the bf16 model that it stands for on a CPU.
    """

    context: int
    steps: int
    layer_bytes: int
    exact: str = "native"


def _full(setting: Setting) -> ArkvConfig:
    return ArkvConfig(
        budget=setting.context + setting.steps + 64, context=setting.context, tiers=("native",),
        score="mass", sinks=0,
    )  # fmt: skip


def _of_bytes(**options: Any) -> Callable[[Setting], ArkvConfig]:
    return lambda setting: ArkvConfig.make(
        {
            "bytes": setting.layer_bytes, "context": setting.context,
            "window_format": setting.exact, **options,
        }
    )  # fmt: skip


def _paper(budget: int) -> Callable[[Setting], ArkvConfig]:
    return lambda setting: ArkvConfig.paper(
        budget, context=setting.context, tiers=(setting.exact, "fp8"), window_format=setting.exact
    )


def _evict(setting: Setting) -> ArkvConfig:
    return _of_bytes(tiers=(setting.exact,), score="mass")(setting)


@dataclass(frozen=True)
class Method:
    """How a method is configured; ``sized``: its size follows from the compression, not from its
    own token budget; ``calibrated``: it takes the calibration that the run is given, if any."""

    configure: Callable[[Setting], ArkvConfig]
    sized: bool = True
    calibrated: bool = False


METHODS: dict[str, Method] = {
    "full": Method(_full, sized=False),
    "evict": Method(_evict),
    "evict-calibrated": Method(_evict, calibrated=True),
    "uniform-int8": Method(_of_bytes(tiers=("int8",))),
    "uniform-int4": Method(_of_bytes(tiers=("int4",))),
    "paper-512": Method(_paper(512), sized=False),
    "paper-1024": Method(_paper(1024), sized=False),
    "paper-2048": Method(_paper(2048), sized=False),
    "uncalibrated": Method(_of_bytes()),
    "default": Method(_of_bytes(), calibrated=True),
}
"""Methods by name; one line adds one."""


def get_method(name: str) -> Method:
    """The method of ``name``, options after a colon ignored.

    Raises:
        UnknownOptionError: for an unknown method.
    """
    base = name.partition(":")[0]
    if base not in METHODS:
        raise UnknownOptionError(f"unknown method {base!r}; known: {', '.join(METHODS)}")
    return METHODS[base]


def make_config(name: str, setting: Setting) -> ArkvConfig:
    """The configuration of a method, written ``name`` or ``name:option=value,option=value``.

    Options are those of ``ArkvConfig``; tiers are joined by ``+``, and ``score.x`` is option x of
    the score: ``default:tiers=int8+int4,oq_ratio=0.2,score.decay=0.95``.

    Raises:
        UnknownOptionError: for an unknown method or option.
        ConfigError: for a value that cannot work.
    """
    config = get_method(name).configure(setting)
    changes = name.partition(":")[2]
    if not changes:
        return config
    options = config.to_dict()
    score: dict[str, float] = dict(config.score_options)
    for change in changes.split(","):
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"method {name!r}: {change!r} is not option=value")
        if key.startswith("score."):
            score[key.removeprefix("score.")] = _value(text)
        elif key == "tiers":
            options[key] = tuple(text.split("+"))
        else:
            options[key] = _value(text)
    options["score_options"] = tuple(score.items())
    return ArkvConfig.make(options)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
