"""The last tier's two queues: by attention, and by what nobody asked for yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arkv_fx import ArkvConfig
from arkv_fx.errors import ConfigError
from arkv_fx.formats import FORMATS
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.plan import EVICTION_SHARE, LayerPlan, Tier, plan_layer
from arkv_fx.scores import SCORES, make_score
from arkv_fx.state.session import LayerState

SHAPE: dict[str, Any] = {"heads": 2, "k_dim": 64, "v_dim": 64, "dtype": torch.bfloat16}


def slots(plan: LayerPlan) -> list[tuple[str, int]]:
    return [(tier.format, tier.slots) for tier in plan.tiers]


def test_a_calibrated_layer_has_two_queues() -> None:
    config = ArkvConfig()
    (first, n), (second, m), (third, k) = slots(plan_layer(config, **SHAPE, calibrated=True))
    assert (first, second, third) == ("k8v4", "k4v3", "k4v3")
    assert abs(k - EVICTION_SHARE * (m + k)) <= config.round_to
    whole = plan_layer(config, **SHAPE)
    assert slots(whole) == [(first, n), (second, m + k)], "equal budgets: one queue"
    half = slots(plan_layer(config.replace(eviction_share=0.5), **SHAPE))[1][1]
    assert abs(half - (m + k) / 2) <= config.round_to
    assert slots(plan_layer(config.replace(eviction_share=1), **SHAPE, calibrated=True)) == slots(
        whole
    )


def test_a_score_with_one_order_has_one_queue() -> None:
    two = {name for name in SCORES if make_score(name).two_orders}
    assert two == {"combined"}
    for name in set(SCORES) - two:
        plan = plan_layer(ArkvConfig(score=name, eviction_share=0.2), **SHAPE, calibrated=True)
        assert len(plan.tiers) == 2


def test_few_slots_are_one_queue() -> None:
    config = ArkvConfig(budget=36 + 8, eviction_share=0.2, oq_ratio=0)
    assert slots(plan_layer(config, **SHAPE)) == [("k8v4", 0), ("k4v3", 8)]


def test_the_share_is_a_share() -> None:
    with pytest.raises(ConfigError, match="eviction_share"):
        ArkvConfig(eviction_share=1.5)


def kept(tiers: tuple[Tier, ...]) -> set[int]:
    """Positions that are left after a prompt of two kinds of tokens that stand out.

    At 10 to 25 somewhat attended ones with common keys, at 30 to 45 unusual keys that nobody
    attends to; those between are neither, those of the ring do not count.
    """
    g = torch.Generator().manual_seed(0)
    dim, length = 16, 80
    k = 0.05 * torch.randn(1, 1, length, dim, generator=g)
    k[..., 0] += 1.0  # what all keys share
    k[:, :, 10:26, 1] += 0.7
    k[:, :, 30:46, 2:] += 0.5 * torch.randn(1, 1, 16, dim - 2, generator=g)
    k[:, :, 30:46, 1] = -0.7
    q = torch.zeros(1, 1, length, dim)
    q[..., 1] = 8.0
    v = torch.randn(1, 1, length, dim, generator=g)
    plan = LayerPlan(1, dim, dim, torch.float32, 8, 0, 0, tiers, "combined")
    state = LayerState(plan, 1, torch.device("cpu"))
    attend(q, k, v, None, state.tensors, plan, Knobs(1.0), fresh=True)
    pos = state.view().pos[..., plan.ring :]
    return set(pos[pos >= 0].tolist())


def test_each_queue_keeps_its_own() -> None:
    attended, unusual = set(range(10, 26)), set(range(30, 46))
    found = kept((Tier("native", 16), Tier("native", 8)))
    assert len(found & attended) == 16, "the first goes by attention"
    assert len(found & unusual) >= 7, "the second by novelty"
    one = kept((Tier("native", 0), Tier("native", 24)))
    assert len(one & attended) < 16, "one mixed rank keeps fewer of them"


@pytest.mark.parametrize("format", [name for name, f in FORMATS.items() if not f.key.plain])
def test_a_token_that_changes_queues_keeps_its_codes(format: str) -> None:
    """Its numbers, encoded once more in the same format, are the same codes."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))

    def again(codec: Any) -> tuple[Tensor, Tensor]:
        once = codec.roundtrip(x)
        return once, codec.roundtrip(once)

    for codec in (FORMATS[format].key, FORMATS[format].value):
        once, twice = again(codec)
        torch.testing.assert_close(once, twice, rtol=0.01, atol=0.01)
        changed = (once - twice).norm() / (once - x).norm().clamp(min=1e-9)
        assert changed < 0.05, f"{codec.name}: {float(changed):.2f} of an encoding's error"


def test_tokens_go_down_a_queue_step_by_step() -> None:
    """While decoding no token is lost that the second queue has room for."""
    plan = LayerPlan(
        1, 16, 16, torch.float32, 2, 0, 0, (Tier("int8", 3), Tier("int8", 5)), "combined"
    )
    whole = replace(plan, tiers=(Tier("int8", 8),))
    for each in (plan, whole):
        state = LayerState(each, 1, torch.device("cpu"))
        g = torch.Generator().manual_seed(1)
        for _ in range(10):
            q, k, v = torch.randn(3, 1, 1, 1, 16, generator=g)
            attend(q, k, v, None, state.tensors, each, Knobs(0.3), fresh=False)
        assert sorted(state.view().pos.flatten().tolist()) == list(range(10))
