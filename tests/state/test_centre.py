"""The centre: what keys of a head have in common is stored once, and never moves under them."""

from __future__ import annotations

import pytest
import torch
from reference_attention import Layer
from torch import Tensor

from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan, Tier

HEADS, DIM, WINDOW, SINKS = 2, 16, 4, 1
RING = WINDOW + SINKS


def layer_of(tiers: tuple[Tier, ...], batch: int = 1) -> Layer:
    plan = LayerPlan(HEADS, DIM, DIM, torch.float32, WINDOW, SINKS, 0, tiers, "mass")
    return Layer(plan, batch)


def feed(layer: Layer, keys: Tensor, lengths: tuple[int, ...], valid: Tensor | None = None) -> None:
    """Give the layer keys [B, H, T, D] in calls of these lengths."""
    valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool) if valid is None else valid
    for length in lengths:
        start = layer.seen
        part = slice(start, start + length)
        k, seen = keys[:, :, part], valid[:, : start + length]
        rows = torch.arange(start, start + length)[:, None]
        mask = (torch.arange(start + length) <= rows) & seen[:, None, None]
        layer.step(k, k, k.clone(), mask, Knobs(0.3), valid[:, part])


def keys_of(tokens: int, batch: int = 1, common: float = 4.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, HEADS, 1, DIM, generator=generator)
    return common * shared + torch.randn(batch, HEADS, tokens, DIM, generator=generator)


def test_it_is_the_mean_key_of_the_prompt_and_then_stays() -> None:
    keys = keys_of(60)
    layer = layer_of((Tier("int4", 40),))
    feed(layer, keys, (50,))
    centre = layer.state.view().centre
    assert centre is not None
    torch.testing.assert_close(centre, keys[:, :, :50].mean(2))
    before = centre.clone()
    feed(layer, keys, (1, 1, 6))
    assert torch.equal(centre, before)


def test_without_a_prompt_it_is_fixed_when_the_first_token_leaves_the_ring() -> None:
    keys = keys_of(20)
    layer = layer_of((Tier("int4", 40),))
    feed(layer, keys, (1,) * 20)
    centre = layer.state.view().centre
    assert centre is not None
    torch.testing.assert_close(centre, keys[:, :, : RING + 1].mean(2))


def test_padding_is_no_part_of_it() -> None:
    keys = keys_of(30)
    alone = layer_of((Tier("int8", 40),))
    feed(alone, keys, (30,))
    padded = layer_of((Tier("int8", 40),))
    valid = torch.arange(37)[None] >= 7
    feed(padded, torch.cat([keys_of(7, seed=1), keys], 2), (37,), valid)
    torch.testing.assert_close(padded.state.view().centre, alone.state.view().centre)


@pytest.mark.parametrize("name", ["native", "bf16", "fp8"])
def test_exact_formats_and_the_paper_s_have_none(name: str) -> None:
    layer = layer_of((Tier(name, 8),))
    assert layer.state.view().centre is None
    assert "centre" not in [spec.name for spec in layer.plan.specs()]
    both = layer_of((Tier(name, 8), Tier("int4", 8))).state.view()
    assert both.tiers[0].centre is None and both.tiers[1].centre is not None


def key_error(layer: Layer) -> float:
    """Mean distance of stored keys to what came, beyond the ring."""
    segment = layer.state.view().tiers[0]
    k, _ = segment.keys_and_values(..., (DIM, DIM))
    errors = [
        (k[0, h, slot] - layer.k[0, h, pos]).norm()
        for h in range(HEADS)
        for slot, pos in enumerate(segment.pos[0, h].tolist())
        if pos >= 0
    ]
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_common_part_costs_no_precision(name: str) -> None:
    """And without the centre it does."""
    errors = {}
    for common in (0.0, 8.0):
        layer = layer_of((Tier(name, 80),))
        feed(layer, keys_of(80, common=common), (80,))
        errors[common] = key_error(layer)
    assert errors[8.0] == pytest.approx(errors[0.0], rel=0.1)
    codec = layer.plan.segments()[1][0].key
    plain = (codec.roundtrip(layer.k) - layer.k).norm(dim=-1).mean()
    assert float(plain) > 1.8 * errors[8.0]
