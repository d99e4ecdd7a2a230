"""A sequence that begins with one token: sizes of 1 are many, and mean different things."""

from __future__ import annotations

import pytest
import torch
from arkv_fx.passes.carry import _reshaped

from arkv_fx import ArkvCache, ArkvConfig, transform
from arkv_fx.zoo.configs import tiny_model


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@torch.no_grad()
def test_keys_computed_from_latents_are_fused_from_the_first_token_on(name: str) -> None:
    model = tiny_model(name)
    ids = torch.randint(1, 64, (1, 6))
    want = model(ids).logits
    config = ArkvConfig(budget=64, window=4, sinks=2, tiers=("native",))
    transform(model, config, compile="eager")
    cache = ArkvCache(model)
    got = [model(one, past_key_values=cache).logits for one in ids.split(1, 1)]
    assert sorted(cache.session.layers) == [0, 1] and not cache.session.plain
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("before", "axis", "after", "expected"),
    [
        ((1, 1, 1, 8), 2, (1, 1, 4, 2), 1),  # sequences, tokens, heads
        ((1, 1, 1, 8), 2, (1, 1, 1, 8), 2),
        ((2, 1, 5, 8), 2, (2, 5, 4, 2), 1),
        ((1, 5, 8), 1, (5, 8), 0),
        ((2, 5, 8), 1, (10, 8), None),
    ],
)
def test_where_the_token_axis_goes(
    before: tuple[int, ...], axis: int, after: tuple[int, ...], expected: int | None
) -> None:
    assert _reshaped(before, axis, after) == expected
