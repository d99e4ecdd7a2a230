"""The default calibration: what each layer's attention loses, from one prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, GptOssConfig, GptOssForCausalLM

import arkv_fx
from arkv_fx.config import ArkvConfig
from arkv_fx.costs import output_errors
from arkv_fx.costs.output_errors import EVERY, Found, OutputErrors
from arkv_fx.errors import CalibrationError
from arkv_fx.models import random_model
from arkv_fx.ops.attend import attend, peek
from arkv_fx.plan import plan_layer, sized
from arkv_fx.state.session import LayerState

CONFIG = ArkvConfig(compression=4.0, window=8, round_to=1, context=192)
IDS = torch.randint(1, 128, (2, 192), generator=torch.Generator().manual_seed(0))
BEFORE = 192 - 192 // 8


def made(arch: str) -> Any:
    """A tiny model: biases by position in "bloom", attention sinks in "gpt_oss"."""
    torch.manual_seed(0)
    if arch == "bloom":
        return BloomForCausalLM(
            BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=2)
        ).eval()
    if arch == "gpt_oss":
        return GptOssForCausalLM(
            GptOssConfig(
                num_hidden_layers=1, num_local_experts=2, vocab_size=128, hidden_size=32,
                intermediate_size=32, head_dim=16,
                num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=1,
                layer_types=["full_attention"], initializer_range=0.5,
            )
        ).eval()  # fmt: skip
    return random_model(arch)


def calls(arch: str, mask: Tensor | None, config: ArkvConfig) -> tuple[list[Any], dict[int, Found]]:
    """What each layer's attention was given, and what was found."""
    kept: list[Any] = []
    founds: list[dict[int, Found]] = []
    original = OutputErrors.attend

    def attend(self: OutputErrors, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        founds.append(self.found)
        kept.append((layer, output_errors.AttendArguments(*args, **kwargs)))
        return original(self, layer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputErrors, "attend", attend)
        masks = None if mask is None else [mask]
        arkv_fx.calibrate(made(arch), [IDS], config, masks)
    return kept, founds[-1]


def by_hand(given: Any, plan: Any, config: ArkvConfig) -> float:
    """The error of one plan through a real state: fill it, then let the chunk attend to it."""
    mask = given.mask
    truth = given.run(lambda *a: peek(*a[:7], True, *a[8:]))[:, :, BEFORE:]
    first = [x[:, :, :BEFORE] for x in (given.q, given.k, given.v)]
    then = [x[:, :, BEFORE:] for x in (given.q, given.k, given.v)]
    state = LayerState(plan, len(first[0]), first[0].device)
    seen = None if mask is None else mask[..., :BEFORE, :BEFORE]
    attend(*first, seen, state.tensors, plan, given.knobs, True)
    late = None if mask is None else mask[..., BEFORE:, :]
    ours = peek(*then, late, state.tensors, plan, given.knobs, False)
    errors = (ours - truth).square().sum((1, 3)) / truth.square().sum((1, 3))
    asked = errors[:, (errors.shape[1] - 1) % EVERY :: EVERY]
    real = torch.ones_like(asked, dtype=torch.bool)
    if mask is not None:
        own = mask.diagonal(dim1=-2, dim2=-1)[:, 0, BEFORE:]
        own = own if own.dtype == torch.bool else own > -1
        real = own[:, (errors.shape[1] - 1) % EVERY :: EVERY].expand_as(asked)
    return float(asked[real].mean())


@pytest.mark.parametrize(
    "arch, pad", [("llama", 0), ("llama", 20), ("llama", -6), ("gpt_oss", 0), ("bloom", 20)]
)
@torch.no_grad()
def test_an_error_is_that_of_the_real_cache(arch: str, pad: int) -> None:
    """Padding on either side, sinks, biases by position; every format, size and ratio."""
    mask = torch.ones_like(IDS)
    if pad > 0:
        mask[0, :pad] = 0
    elif pad < 0:
        mask[0, pad:] = 0
    kept, found = calls(arch, mask, CONFIG)
    layer, given = next((i, g) for i, g in kept if not g.layer_plan.sliding)
    tried = found[layer].tried
    assert len({size for size, _, _ in tried}) > 3 and tried[-1][1] == 1.0
    for size, ratio, error in (tried[0], tried[len(tried) // 2], tried[-2], tried[-1]):
        shape = given.layer_plan
        plan = plan_layer(
            sized(CONFIG, shape, size, BEFORE), heads=shape.heads, k_dim=shape.k_dim,
            v_dim=shape.v_dim, dtype=shape.dtype, oq_ratio=ratio,
            calibrated=True, positions=shape.positions,
        )  # fmt: skip
        assert plan.nbytes() <= size * shape.full_nbytes(BEFORE, dtype=torch.bfloat16)
        assert error == pytest.approx(by_hand(given, plan, CONFIG), rel=2e-3, abs=1e-7)


def test_more_bytes_lose_less_and_all_lose_next_to_nothing() -> None:
    _, found = calls("llama", None, CONFIG)
    for layer in found.values():
        sizes = sorted({size for size, _, _ in layer.tried})
        best = [min(e for s, _, e in layer.tried if s == size) for size in sizes]
        assert best[0] > 100 * best[-1] and best[-1] < 1e-2


def test_a_broken_state_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: plans that keep every token lose nothing."""
    monkeypatch.setattr(output_errors, "settle", lambda *a, **k: None)
    with pytest.raises(AssertionError):
        test_an_error_is_that_of_the_real_cache("llama", 0)


def test_costs_are_solved_for_the_budget_that_uses_them() -> None:
    model = random_model("llama", num_hidden_layers=3)
    with torch.no_grad():  # there is nothing to be lost
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    found = arkv_fx.calibrate(model, [IDS, IDS[:1].flip(1)], CONFIG)
    assert found.mode == "output" and found.samples == (192, 192)
    # In float32 a quarter is a half of 16 bits.
    assert found == found.at(0.5)
    assert sum(row.share for row in found.layers) <= 3
    assert found.row(1).share == 0.5 and max(row.share for row in found.layers) > 1
    tight = found.at(0.25)
    assert [r.oq_ratio for r in tight.layers] != [r.oq_ratio for r in found.layers]
    for config, solved in ((CONFIG, found), (CONFIG.replace(compression=8.0), tight)):
        arkv_fx.transform(model, config, found, compile="eager")
        report = model.arkv.report()
        assert report.nbytes <= report.full_nbytes / config.compression
        for site, row in zip(report.rows, solved.layers, strict=True):
            expected = plan_layer(
                config, heads=2, k_dim=16, v_dim=16, dtype=torch.float32, share=row.share,
                oq_ratio=row.oq_ratio, shares=solved.shares(()),
                calibrated=True, positions=model.arkv.backend.positions,
            )  # fmt: skip
            assert site["slots"] == expected.slots
        arkv_fx.restore(model)


def test_a_budget_of_tokens_has_costs_of_tokens() -> None:
    config = ArkvConfig(budget=48, window=8, context=192)
    model = random_model("llama")
    found = arkv_fx.calibrate(model, IDS, config)
    assert found.unit == "tokens"
    assert found.at(0.25, "bytes") is found, "of bytes they say nothing"
    arkv_fx.transform(model, config, found, compile="eager")
    slots = [row["slots"] for row in model.arkv.report().rows]
    assert slots == [round(48 * row.share) for row in found.layers]


def test_sliding_layers_keep_their_plan() -> None:
    sliding, full = arkv_fx.calibrate(random_model("gemma3"), IDS, CONFIG).layers
    assert (sliding.share, sliding.oq_ratio, sliding.costs) == (1.0, CONFIG.oq_ratio, ())
    assert full.costs and full.divergence is not None


def test_too_short_a_prompt_is_refused() -> None:
    with pytest.raises(CalibrationError, match="too short to try budgets"):
        arkv_fx.calibrate(random_model("llama"), IDS[:, :14], CONFIG)


def test_what_wastes_bytes_is_not_tried() -> None:
    """Where all tokens fit with more Originals, fewer of them are no option."""
    shape = plan_layer(CONFIG, heads=2, k_dim=64, v_dim=64, dtype=torch.bfloat16)
    tried = output_errors._plans(CONFIG, shape, 1000)
    for size in {size for size, _, _ in tried}:
        plans = [plan for s, _, plan in tried if s == size]
        assert sum(plan.slots >= 1000 for plan in plans) <= 1
        assert len(plans) == 5 or any(plan.slots >= 1000 for plan in plans)
    assert tried[-1][1] == 1.0 and tried[-1][2].tiers[0].slots >= 1000 - 12


def test_layers_are_measured_with_positions_as_they_will_have_them() -> None:
    """Two bytes a slot are more slots, or fewer."""
    for context, short in ((192, True), (2**15, False)):
        _, found = calls("llama", None, CONFIG.replace(context=context))
        assert {each.shape.short_positions for each in found.values()} == {short}
