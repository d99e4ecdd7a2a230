"""Balanced channels: the same logits, better codes."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from reference_attention import Layer, make_mask
from torch import Tensor

from arkv_fx import ArkvConfig
from arkv_fx.errors import ConfigError
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops import balance
from arkv_fx.ops.balance import channel_scales
from arkv_fx.plan import LayerPlan, Tier, plan_layer
from arkv_fx.state.unwind import unwind

HEADS, GROUPS, DIM = 2, 2, 16
KNOBS = Knobs(DIM**-0.5)


def tokens(length: int, seed: int, batch: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, length, DIM, generator=g)
        for heads in (HEADS * GROUPS, HEADS, HEADS)
    ]


def outlying(q: Tensor, k: Tensor, by: float = 16.0) -> tuple[Tensor, Tensor]:
    """The same logits with a channel of every head larger in the keys."""
    size = torch.ones(DIM)
    size[3] = by
    return q / size, k * size


def ran(
    plan: LayerPlan, history: list[tuple[Tensor, Tensor, Tensor]], pad: int = 0
) -> tuple[list[Tensor], Layer]:
    layer = Layer(plan, len(history[0][0]))
    outs, valid = [], torch.ones(1, 0, dtype=torch.bool)
    for q, k, v in history:
        real = torch.arange(valid.shape[1], valid.shape[1] + q.shape[2])[None] >= pad
        valid = torch.cat([valid, real], 1)
        mask = make_mask(valid, q.shape[2], kind="bool") if pad else None
        outs.append(layer.step(q, k, v, mask, KNOBS, real, fresh=not layer.seen))
    return outs, layer


def plan_of(tiers: tuple[Tier, ...], dtype: torch.dtype = torch.float32) -> LayerPlan:
    return LayerPlan(HEADS, DIM, DIM, dtype, 4, 1, 0, tiers, "mass", balanced=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    lengths=st.lists(st.sampled_from((1, 1, 2, 7, 20)), min_size=1, max_size=5),
    pad=st.integers(0, 3),
    size=st.sampled_from((1.0, 16.0, 1000.0)),
)
def test_no_logit_changes(dtype: torch.dtype, lengths: list[int], pad: int, size: float) -> None:
    """Where nothing is quantized the outputs are bit for bit those without it."""
    history = []
    for seed, length in enumerate(lengths):
        q, k, v = tokens(length, seed)
        q, k = outlying(q, k, size)
        history.append(tuple(x.to(dtype) for x in (q, k, v)))
    balanced = plan_of((Tier("native", 50),), dtype)
    found, layer = ran(balanced, history, pad)
    expected, _ = ran(replace(balanced, balanced=False), history, pad)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    scale = layer.state.view().layer["scale"]
    assert torch.equal(scale.log2(), scale.log2().round()), "powers of two"
    if lengths[0] - pad > 6 and size == 16.0:
        assert (scale[:, :, 3] > scale[:, :, :3].amax(-1)).all(), "nothing was balanced"


def error(plan: LayerPlan, by: float) -> float:
    """Of decoded tokens, over quantized slots, where a channel is ``by`` times larger."""
    prompt, later = tokens(60, 0), [tokens(1, seed) for seed in range(1, 9)]
    history = [(*outlying(q, k, by), v) for q, k, v in (prompt, *later)]
    whole = replace(plan, tiers=(Tier("native", 80),))
    pairs = zip(ran(plan, history)[0][1:], ran(whole, history)[0][1:], strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs) ** 0.5


@pytest.mark.parametrize("format", ["int8", "int4", "k8v4", "k4v3"])
def test_an_outlier_channel_does_not_matter(format: str) -> None:
    plan = plan_of((Tier(format, 80),))
    even = error(plan, 1.0)
    assert error(plan, 16.0) < 1.3 * even
    # Of k8v4 and k4v3 the values' error, which keys do not change, is the larger part.
    coarse = error(replace(plan, balanced=False), 16.0)
    assert coarse > {"k8v4": 1.0, "k4v3": 1.2}.get(format, 2.0) * even, "it would not show"


def test_padding_does_not_count() -> None:
    q, k, _ = tokens(30, 0)
    q, k = outlying(q, k)
    valid = torch.ones(1, 30, dtype=torch.bool)
    alone = channel_scales(q, k, valid)
    junk = torch.full_like(k, 1e4), torch.full_like(q, float("nan"))
    padded = channel_scales(
        torch.cat([junk[1], q], 2), torch.cat([junk[0], k], 2),
        torch.cat([~valid, valid], 1),
    )  # fmt: skip
    assert torch.equal(alone, padded)


def test_degenerate_channels_stay_as_they_are() -> None:
    q, k, _ = tokens(30, 0)
    k[..., 2], q[..., 5], k[..., 7] = 0.0, 0.0, float("inf")
    scale = channel_scales(q, k, torch.ones(1, 30, dtype=torch.bool))
    assert torch.isfinite(scale).all() and (scale[..., [2, 5, 7]] == 1).all()


def test_half_precision_keeps_its_range() -> None:
    """A bias that hardly varies would be blown up beyond what a half can hold."""
    q, k, v = (x.half() for x in tokens(40, 0))
    k[..., 3] = 300 + k[..., 3] / 100
    scale = channel_scales(q, k, torch.ones(1, 40, dtype=torch.bool))
    assert (k[..., 3].float().amax(2) / scale[..., 3] <= 2**13).all()
    outs, layer = ran(plan_of((Tier("int8", 60),), torch.float16), [(q, k, v)])
    assert torch.isfinite(outs[0]).all() and not layer.state.view().bad.any()


def test_the_first_tokens_decide() -> None:
    plan = plan_of((Tier("int8", 60),))
    first, later = tokens(20, 0), tokens(20, 1)
    history = [tuple(first), (*outlying(*later[:2]), later[2])]
    before = ran(plan, history[:1])[1].state.view().layer["scale"]
    assert torch.equal(ran(plan, history)[1].state.view().layer["scale"], before)
    single = ran(plan, [tuple(x[:, :, :1] for x in first)])[1]
    assert (single.state.view().layer["scale"] == 1).all(), "one token says nothing"


def test_tokens_taken_back_leave_the_numbers_alone() -> None:
    plan = replace(plan_of((Tier("int8", 8),)), window=30)
    q, k, v = tokens(20, 0)
    layer = ran(plan, [(*outlying(q, k), v)])[1]
    before = layer.state.view().layer["scale"].clone()
    unwind(layer.state, 3)
    assert torch.equal(layer.state.view().layer["scale"], before) and not (before == 1).all()
    assert int(layer.state.view().seen) == 17


def test_the_option() -> None:
    shape = {"heads": 2, "k_dim": 64, "v_dim": 64, "dtype": torch.float32}
    assert plan_layer(ArkvConfig(), **shape).balanced
    assert not plan_layer(ArkvConfig(balance=False), **shape).balanced
    assert not plan_layer(ArkvConfig(tiers=("native",)), **shape).balanced, "nothing to gain"
    assert not plan_layer(ArkvConfig.paper(), **shape).balanced, "as published"
    assert balance.MOST * 2 + 3 < 127, "exponents of float32"
    with pytest.raises(ConfigError, match="balance"):
        ArkvConfig(balance=1)  # type: ignore[arg-type]
