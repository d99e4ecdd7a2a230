"""A layer's state by name: `LayerPlan.specs` alone knows the order of its tensors."""

from __future__ import annotations

import pytest
import torch

from arkv_fx import ArkvConfig
from arkv_fx.plan import LayerPlan, TensorSpec, plan_layer
from arkv_fx.scores import SCORES
from arkv_fx.state.session import LayerState
from arkv_fx.state.view import View

TIERS = [("native",), ("int8", "int4"), ("k8v4", "k4v3"), ("native", "fp8")]


class Backwards(LayerPlan):
    """The same tensors in another order."""

    def specs(self) -> list[TensorSpec]:
        return super().specs()[::-1]


def seen(view: View) -> dict[str, int]:
    """Where each tensor of a view lies, by the name that it should have."""
    named = {"count": view.count, "seen": view.seen, "bad": view.bad, "pos": view.pos}
    named |= view.layer | view.stats
    if view.centre is not None:
        named["centre"] = view.centre
    for index, segment in enumerate(view.segments):
        prefix = "ring" if index == 0 else f"tier{index - 1}"
        for side, (codec, tensors) in zip("kv", segment.parts(), strict=True):
            dim = view.plan.k_dim if side == "k" else view.plan.v_dim
            names = [f.name for f in codec.fields(dim, view.plan.dtype)]
            named |= {f"{prefix}.{side}.{n}": t for n, t in zip(names, tensors, strict=True)}
    return {name: t.data_ptr() for name, t in named.items()}


@pytest.mark.parametrize("kind", [LayerPlan, Backwards])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tiers", TIERS)
def test_names_find_the_same_tensors_whatever_the_order(
    kind: type[LayerPlan], score: str, tiers: tuple[str, ...]
) -> None:
    config = ArkvConfig(budget=24, window=4, tiers=tiers, score=score)
    found = plan_layer(config, heads=2, k_dim=16, v_dim=32, dtype=torch.float32)
    plan = kind(**{name: getattr(found, name) for name in LayerPlan.__dataclass_fields__})
    state = LayerState(plan, 3, torch.device("cpu"))
    assert seen(state.view()) == {name: t.data_ptr() for name, t in state.named().items()}
    for spec in plan.specs():
        tensor = state[spec.name]
        assert (tensor.shape, tensor.dtype) == ((3, *spec.shape), spec.dtype)
        assert (tensor == spec.fill).all() or spec.dtype == torch.uint8


def test_a_state_of_another_plan_has_no_names() -> None:
    plans = [
        plan_layer(ArkvConfig(budget=24, window=4, tiers=tiers), heads=1, k_dim=16, v_dim=16,
                   dtype=torch.float32) for tiers in (("native",), ("int8", "int4"))
    ]  # fmt: skip
    state = LayerState(plans[0], 1, torch.device("cpu"))
    state.plan = plans[1]
    with pytest.raises(ValueError, match="shorter"):
        state.view()


def test_a_clone_shares_nothing() -> None:
    plan = plan_layer(ArkvConfig(budget=64), heads=1, k_dim=16, v_dim=16, dtype=torch.float32)
    state = LayerState(plan, 1, torch.device("cpu"))
    twin = state.clone()
    twin["pos"].fill_(7)
    assert (state["pos"] == -1).all() and twin.plan is plan
