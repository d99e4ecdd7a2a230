"""Novelty is of keys and values, and that of a phrase as soon as a token leaves the window."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_attention import Layer, make_mask
from torch import Tensor

from arkv_fx.errors import ConfigError
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.scores import make_score
from arkv_fx.scores.novelty import NoveltyScore

HEADS, DIM, VALUE = 2, 8, 16
KNOBS = Knobs(0.35)


def layer_of(score: str, window: int, slots: int, batch: int = 1, **options: float) -> Layer:
    tiers = (Tier("native", slots // 2), Tier("int8", slots - slots // 2))
    plan = LayerPlan(HEADS, DIM, VALUE, torch.float32, window, 2, 0, tiers, score,
                     tuple(sorted(options.items())))  # fmt: skip
    return Layer(plan, batch)


def run(layer: Layer, valid: Tensor, generator: torch.Generator) -> None:
    """One call with random numbers."""
    batch, length = valid.shape
    q = torch.randn(batch, HEADS * 2, length, DIM, generator=generator)
    k = torch.randn(batch, HEADS, length, DIM, generator=generator) + 0.5
    v = torch.randn(batch, HEADS, length, VALUE, generator=generator) + 0.5
    seen = torch.cat([layer.valid, valid], 1)
    mask = None if bool(seen.all()) else make_mask(seen, length, kind="bool")
    layer.step(q, k, v, mask, KNOBS, valid, fresh=layer.seen == 0 and length > 1)


@settings(max_examples=40)
@given(
    calls=st.lists(st.integers(1, 14), min_size=3, max_size=9),
    pad=st.integers(0, 5),
    window=st.sampled_from((1, 2, 5, 9, 12)),
    score=st.sampled_from(("novelty", "combined")),
    ahead=st.sampled_from((0, 3, 8)),
)
def test_what_has_left_the_window_has_the_mean_of_those_behind_it(
    calls: list[int], pad: int, window: int, score: str, ahead: int
) -> None:
    """However they came: as a prompt, in chunks or one by one, and with padding before them."""
    arrived: list[Tensor] = []
    original = NoveltyScore.arrive

    def spy(self: NoveltyScore, *args: Any) -> Any:
        found = original(self, *args)
        arrived.append(found["novelty"])
        return found

    calls = [max(calls[0], pad + 1), *calls[1:]]
    layer = layer_of(score, window, 400, batch=2, ahead=ahead)
    generator = torch.Generator().manual_seed(sum(calls) + pad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoveltyScore, "arrive", spy)
        for number, length in enumerate(calls):
            valid = torch.ones(2, length, dtype=torch.bool)
            valid[1, : pad if number == 0 else 0] = False
            run(layer, valid, generator)
    own = torch.cat(arrived, -1)
    view, ahead = layer.state.view(), min(ahead, window - 1)
    left = 0
    for level, segment in enumerate(view.segments):
        for b, h, slot in (segment.pos >= 0).nonzero().tolist():
            pos = int(segment.pos[b, h, slot])
            expected = float(own[b, h, pos])
            if level and ahead:
                mean = own[b, h, pos : pos + ahead + 1].double().mean()
                expected = min(127.0, float((127 + 2 * mean).round()))
            left += level > 0
            off = abs(float(segment.stats["novelty"][b, h, slot]) - expected)
            assert off <= (1 if level and ahead else 0), (b, h, pos, level)
    assert left == sum(max(0, sum(calls) - gone - 2 - window) for gone in (0, pad)) * HEADS


def test_it_is_less_the_cosines_with_the_mean_key_and_the_mean_value() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 7, DIM, generator=generator)
    v = torch.randn(1, 1, 7, VALUE, generator=generator)
    layer = {"key_sum": torch.zeros(1, 1, DIM), "value_sum": torch.zeros(1, 1, VALUE)}
    found = NoveltyScore().arrive(k, v, torch.ones(1, 7, dtype=torch.bool), layer)["novelty"]
    cosines = []
    for x in (k, v):
        unit = x[0, 0].double() / x[0, 0].double().norm(dim=-1, keepdim=True)
        mean = unit.mean(0)
        cosines.append(unit @ mean / mean.norm())
    assert (found[0, 0].double() + 127 * (cosines[0] + cosines[1]) / 2).abs().max() <= 0.501
    assert NoveltyScore().leave({"novelty": found}, torch.ones(1, 1, 7).bool(), 6)[
        "novelty"
    ].dtype == torch.int8  # fmt: skip


@pytest.mark.parametrize("side", ["keys", "values", "neither"])
def test_a_needle_is_found_by_its_key_or_by_its_value(side: str) -> None:
    """Five tokens that stand out, which no query looks at; in neither they are as all others."""
    generator = torch.Generator().manual_seed(1)
    length, needle = 120, slice(40, 45)
    common = torch.randn(DIM, generator=generator), torch.randn(VALUE, generator=generator)
    k, v = (3 * c + torch.randn(1, HEADS, length, len(c), generator=generator) for c in common)
    for x, name in ((k, "keys"), (v, "values")):
        if name == side:
            x[:, :, needle] *= -1
    layer = layer_of("novelty", 12, 24)
    q = torch.randn(1, HEADS * 2, length, DIM, generator=generator)
    layer.step(q, k, v, None, KNOBS, torch.ones(1, length, dtype=torch.bool), fresh=True)
    held = [set(tokens.pos) >= set(range(40, 45)) for tokens in layer.held()[0]]
    assert all(held) if side != "neither" else not any(held)


@pytest.mark.parametrize("ahead", [-1, 65, 1.5])
def test_a_length_that_is_none_is_refused(ahead: float) -> None:
    with pytest.raises(ConfigError, match="ahead"):
        make_score("novelty", {"ahead": ahead})
