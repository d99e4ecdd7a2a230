"""Under ``torch.autocast`` a transformed model answers as the plain one does there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import arkv_fx
from arkv_fx.errors import CacheError
from arkv_fx.models import random_model

ROOMY = arkv_fx.ArkvConfig(budget=96, window=8, tiers=("native",))
NEW = 8


def ids() -> Tensor:
    return torch.randint(1, 128, (2, 50), generator=torch.Generator().manual_seed(0))


def steps(model: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, object]:
    """Logits of a prompt and of given tokens one by one, and the cache."""
    found, cache = [], None
    for part in (tokens[:, :-NEW], *tokens[:, -NEW:].split(1, 1)):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1), cache


@pytest.mark.parametrize(
    ("arch", "attention", "compile"),
    [
        ("llama", "sdpa", "inductor"), ("llama", "sdpa", "eager"), ("gpt2", "eager", "eager"),
        ("gemma3", "eager", "eager"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_logits_are_the_plain_models(arch: str, attention: str, compile: str) -> None:
    torch._dynamo.reset()
    plain, model = random_model(arch), random_model(arch)
    for each in (plain, model):
        each.set_attn_implementation(attention)
    exact, _ = steps(plain, ids())
    arkv_fx.transform(model, ROOMY, compile=compile)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = steps(plain, ids())
        found, cache = steps(model, ids())
        assert model.arkv.report().fused == 2
    # What bfloat16 costs either of them is of one size.
    cost = (expected - exact).abs().mean()
    assert (found - expected).abs().mean() < 1.5 * cost
    assert found.dtype == expected.dtype
    assert isinstance(cache, arkv_fx.ArkvCache)
    # As attention reads them.
    assert {s.plan.dtype for s in cache.session.layers.values()} == {torch.bfloat16}


@torch.no_grad()
def test_without_autocast_nothing_is_lowered() -> None:
    model = arkv_fx.transform(random_model("llama"), ROOMY, compile="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps(model, ids())
    expected, _ = steps(random_model("llama"), ids())
    found, cache = steps(model, ids())
    assert {s.plan.dtype for s in cache.session.layers.values()} == {torch.float32}  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(CacheError, match="begun under another configuration"):
            model(ids()[:, :1], past_key_values=cache)


@pytest.mark.parametrize("tiers", [("int8", "int4"), ("k8v4", "k4v3"), ("native", "fp8")])
@torch.no_grad()
def test_codes_are_those_of_bfloat16(tiers: tuple[str, str]) -> None:
    config = arkv_fx.ArkvConfig(budget=32, window=8, tiers=tiers)
    model = arkv_fx.transform(random_model("llama"), config, compile="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = steps(model, ids())
        assert torch.isfinite(found).all()
        out = model.generate(ids(), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 54)
