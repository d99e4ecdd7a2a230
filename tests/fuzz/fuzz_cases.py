"""What a seed stands for: a transformed model, and one way of using its cache.

Tracing costs seconds and a use of what was traced milliseconds, so ``SCRIPTS`` seeds in a row share
a model. Seed and nothing else decides what a case is.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import torch
from fuzz_models import ARCHITECTURES, ENCODERS

from arkv_fx import ArkvConfig
from arkv_fx.formats import FORMATS
from arkv_fx.scores import SCORES

SCRIPTS = 67  # cases that share a model
LONGEST = 120  # tokens of a case, at most

Kind = Literal["identity", "alone", "lowered"]
KINDS: tuple[Kind, ...] = (
    "identity", "alone", "identity", "alone", "identity", "alone", "lowered", "identity", "alone",
    "identity", "alone", "identity", "alone", "identity", "alone", "identity",
)  # fmt: skip
"""What is compared, in turns.

identity: a cache with room for everything against the plain model without a cache. alone: a row of
a batch against itself alone, under a small budget. lowered: Inductor's graphs against eager ones,
under a small budget.
"""


@dataclass(frozen=True)
class Group:
    """A model, a configuration, and what all scripts of the group have in common."""

    number: int
    kind: Kind
    architecture: str
    settings: dict[str, Any]
    dtype: torch.dtype
    attention: str
    config: ArkvConfig
    batch: int
    padding: Literal["none", "left", "right", "holes"]
    positions: bool  # whether they are given, or left to the model


@dataclass(frozen=True)
class Turn:
    """One thing done with a cache.

    read: a call with ``size`` tokens. steps: ``size`` calls with one. generate: ``generate()`` of
    ``size`` tokens, after ``ahead`` new ones. fork: a deep copy goes on by ``size`` tokens, and is
    dropped or replaces the original (``ahead`` 1). select: rows drawn with repetition. narrow: one
    row alone for ``size`` tokens, then as many of it as before. reset: a new sequence, of ``size``.
    """

    what: str
    size: int
    ahead: int = 0


@dataclass(frozen=True)
class Case:
    """A group and what is done with it; ``seed`` also draws the tokens."""

    seed: int
    group: Group
    turns: tuple[Turn, ...]

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.group}, {self.turns}\n"
            f"again: python tests/fuzz/fuzz_run.py {self.seed}"
        )


def case(seed: int) -> Case:
    """What ``seed`` (0 or more) stands for."""
    group = draw_group(seed // SCRIPTS)
    return Case(seed, group, _turns(group, Random(f"script {seed}")))


def draw_group(number: int) -> Group:
    """The model that the seeds from ``number * SCRIPTS`` on share."""
    rng = Random(f"group {number}")
    kind = KINDS[number % len(KINDS)]
    names = [name for name in ARCHITECTURES if kind != "lowered" or name not in ENCODERS]
    architecture = rng.choice(names)
    # What depends on the order of sums, ranks and codes, is compared where sums are precise.
    dtypes = (torch.float32,) * 3 + (torch.bfloat16, torch.float16) * (kind == "identity")
    encoder = architecture in ENCODERS
    padding: Any = rng.choice(("none", "left", "left", "right", "holes"))
    if kind == "alone":  # elsewhere the distance of two tokens would depend on the batch
        padding = "left"
    if encoder:
        padding = "none"
    return Group(
        number=number,
        kind=kind,
        architecture=architecture,
        settings=ARCHITECTURES[architecture](rng) | _layers(architecture, rng),
        dtype=rng.choice(dtypes),
        attention=rng.choice(("sdpa", "sdpa", "eager")),
        config=_roomy(rng) if kind == "identity" else _small(rng),
        batch=2 if kind == "alone" else rng.choice((1, 1, 2, 3)),
        padding=padding,
        positions=padding != "none" and (kind == "alone" or rng.random() < 0.8),
    )


def _layers(architecture: str, rng: Random) -> dict[str, Any]:
    """One layer is half the time to trace; some have two of different kinds."""
    if architecture in ("gemma2", "gemma3_text", "gpt_oss", "gpt_neo", "deepseek_v3"):
        return {}
    layers = rng.choice((1, 1, 1, 1, 2))
    names = {"gpt2": ["n_layer"], "gptj": ["n_layer"], "bloom": ["n_layer"]}
    names |= {"t5": ["num_layers"], "bart": ["decoder_layers"]}
    return dict.fromkeys(names.get(architecture, ["num_hidden_layers"]), layers)


def _roomy(rng: Random) -> ArkvConfig:
    tiers = ("native",) * rng.choice((1, 2))
    return ArkvConfig(
        budget=LONGEST + 30, tiers=tiers, window=rng.choice((1, 3, 8, 32)),
        sinks=rng.choice((0, 1, 4)), oq_ratio=rng.choice((0.0, 0.3, 1.0)),
        score=rng.choice(list(SCORES)),
    )  # fmt: skip


def _small(rng: Random) -> ArkvConfig:
    window, sinks = rng.choice((1, 3, 6)), rng.choice((0, 1, 3))
    budget = window + sinks + rng.choice((2, 7, 16))
    formats = list(FORMATS)
    tiers = tuple(rng.choice(formats) for _ in range(rng.choice((1, 2, 2))))
    return ArkvConfig(
        budget=budget, tiers=tiers, window=window, sinks=sinks,
        window_format=rng.choice(("native", "native", "bf16")),
        oq_ratio=rng.choice((0.0, 0.3, 0.5, 1.0)), score=rng.choice(list(SCORES)),
    )  # fmt: skip


def _turns(group: Group, rng: Random) -> tuple[Turn, ...]:
    """A prompt and a handful of turns, never more than ``LONGEST`` tokens."""
    turns = [Turn("read", rng.choice((2, 5, 9, 17, 30)))]
    kinds = ["read", "steps", "steps", "fork", "reset"]
    if group.batch > 1:
        kinds += ["select"]
    if group.kind == "identity":
        kinds += ["generate"]
        # transformers narrows no cache of an encoder-decoder.
        if group.batch > 1 and group.padding == "none" and group.architecture not in ENCODERS:
            kinds += ["narrow"]
    total = turns[0].size
    for _ in range(rng.randint(1, 4)):
        what = rng.choice(kinds)
        size = rng.choice((2, 3, 8, 20)) if what in ("read", "reset") else rng.randint(1, 6)
        turn = Turn(what, size, rng.randint(1, 3) if what == "generate" else rng.randint(0, 1))
        if total + turn.size + turn.ahead > LONGEST:
            break
        total += turn.size + turn.ahead
        turns.append(turn)
    return tuple(turns)
