"""Measured calibration: what a layer minds, and where the bytes go."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import arkv_fx
from arkv_fx import ArkvCache, ArkvConfig
from arkv_fx.allocation import SHARES, Costs, Option, allocate
from arkv_fx.calibrating import sensitivity
from arkv_fx.calibrating.sensitivity import divergences
from arkv_fx.calibration import Calibration, LayerStatistics, fingerprint
from arkv_fx.config import PAPER_TAUS
from arkv_fx.errors import CalibrationError, ConfigError
from arkv_fx.models import random_model

CONFIG = ArkvConfig(compression=4.0, window=8, round_to=1, calibration="measured")
EVICT = ArkvConfig(compression=4.0, window=8, round_to=1, tiers=("native",), score="mass")
IDS = torch.randint(1, 128, (1, 192), generator=torch.Generator().manual_seed(0))
CONTEXT = 168  # an eighth of the tokens is predicted


def summed(chosen: dict[int, Option], costs: Costs) -> float:
    return sum(costs[layer][option] for layer, option in chosen.items())


costs = st.lists(
    st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4
).map(
    lambda rows: {
        layer: {Option(s, 0.1): x for s, x in zip((0.5, 1.0, 2.0), row, strict=True)}
        for layer, row in enumerate(rows)
    }
)  # fmt: skip


@given(costs)
def test_allocation_keeps_the_budget_and_is_no_worse_than_equal_shares(
    costs: Costs,
) -> None:
    chosen = allocate(costs)
    assert sum(o.share for o in chosen.values()) <= len(costs) + 1e-9
    halves = {layer: Option(0.5, 0.1) for layer in costs}
    assert summed(chosen, costs) <= summed(halves, costs) + 1e-9


def test_allocation_is_the_best_there_is_where_gains_diminish() -> None:
    def curve(scale: float) -> dict[Option, float]:
        return {Option(s, 0.1): scale * 4**-s for s in SHARES}

    costs = {0: curve(1.0), 1: curve(30.0), 2: curve(0.01)}
    every = (
        dict(zip(costs, options, strict=True))
        for options in itertools.product(*(costs[layer] for layer in costs))
    )
    best = min(
        summed(chosen, costs) for chosen in every if sum(o.share for o in chosen.values()) <= 3
    )
    chosen = allocate(costs)
    assert summed(chosen, costs) <= 1.1 * best
    assert chosen[1].share > chosen[0].share >= chosen[2].share


def test_a_richer_option_of_the_same_bytes_is_taken() -> None:
    costs = {0: {Option(1.0, 0.1): 0.5, Option(1.0, 0.7): 0.2, Option(2.0, 0.1): 0.0}}
    assert allocate(costs) == {0: Option(1.0, 0.7)}


def test_a_layer_that_does_not_matter_costs_nothing_and_gets_least() -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    before = model(IDS).logits
    found = divergences(model, IDS, None, CONFIG)
    assert torch.equal(model(IDS).logits, before)  # restored, nothing left behind
    assert max(found[1].values()) < 1e-8
    assert found[0][Option(0.5, CONFIG.oq_ratio)] > 100 * 1e-8
    assert found[0][Option(2.0, CONFIG.oq_ratio)] < found[0][Option(0.5, CONFIG.oq_ratio)]
    chosen = allocate(found)
    assert chosen[0].share > 1 and chosen[1].share == SHARES[0]


@pytest.mark.parametrize("pad", [0, 20])
def test_a_trial_is_what_the_real_cache_does(pad: int) -> None:
    """One layer evicts, the other holds everything: by hand, through the transformed model."""
    model = random_model("llama")
    mask = torch.ones_like(IDS)
    mask[:, :pad] = 0
    found = divergences(model, IDS, mask, EVICT)[0][Option(0.5, EVICT.oq_ratio)]
    reference = model(IDS, attention_mask=mask).logits[:, CONTEXT:].log_softmax(-1)
    # Half a share of a quarter of the bytes, and more than all of them.
    rows = tuple(LayerStatistics(i, 1, 1, 1, 1, 0.0, s) for i, s in enumerate((0.5 / 4, 1.5)))
    calibration = Calibration(fingerprint(model), "measured", PAPER_TAUS, (192,), rows)
    config = EVICT.replace(context=CONTEXT, compression=1.0)
    arkv_fx.transform(model, config, calibration, compile="eager")
    cache = ArkvCache(model)
    model(IDS[:, :CONTEXT], attention_mask=mask[:, :CONTEXT], past_key_values=cache)
    ours = model(IDS[:, CONTEXT:], attention_mask=mask, past_key_values=cache).logits
    kl = (reference.exp() * (reference - ours.log_softmax(-1))).sum(-1).mean()
    assert found > 1e-6
    assert found == pytest.approx(float(kl), rel=1e-2)


def test_shares_are_spent_and_no_more() -> None:
    model = random_model("llama")
    found = arkv_fx.calibrate(model, [IDS, IDS.flip(1)], CONFIG)
    assert found.mode == "measured" and found.samples == (192, 192)
    assert sum(row.share for row in found.layers) <= len(found.layers)
    assert all(row.divergence is not None for row in found.layers)
    arkv_fx.transform(model, CONFIG.replace(context=192), found, compile="eager")
    rows = model.arkv.report().rows
    full = sum(row["full_nbytes"] for row in rows)
    assert sum(row["nbytes"] for row in rows) <= full / CONFIG.compression


def test_sliding_layers_keep_their_plan() -> None:
    found = arkv_fx.calibrate(random_model("gemma3"), IDS, CONFIG)
    sliding, full = found.layers
    assert (sliding.share, sliding.divergence) == (1.0, None)
    assert full.divergence is not None


def test_a_token_budget_is_shared_out_too() -> None:
    config = CONFIG.replace(budget=48, tiers=("native",), score="mass")
    model = random_model("llama")
    found = arkv_fx.calibrate(model, IDS, config)
    arkv_fx.transform(model, config, found, compile="eager")
    slots = [row["slots"] for row in model.arkv.report().rows]
    assert slots == [round(48 * row.share) for row in found.layers]


def test_refusals() -> None:
    model = random_model("llama")
    with pytest.raises(CalibrationError, match="too short to measure layers"):
        arkv_fx.calibrate(model, IDS[:, :14], CONFIG)
    with pytest.raises(CalibrationError, match="longer prompts, or calibration='normalised'"):
        arkv_fx.calibrate(model, IDS, CONFIG.replace(budget=400, tiers=("native",)))
    with pytest.raises(ConfigError, match="does not hold the window"):
        arkv_fx.calibrate(model, IDS, CONFIG.replace(compression=60.0))
    assert not hasattr(model, "arkv")


def test_broken_trials_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: trials that read the full cache say that nothing matters."""

    original = sensitivity.Trials.attend

    def attend(self: sensitivity.Trials, *args: object) -> Tensor:
        self.now = None
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity.Trials, "attend", attend)
    with pytest.raises(AssertionError):
        test_a_trial_is_what_the_real_cache_does(0)


def test_a_calibration_serves_a_budget_that_is_tighter_than_its_own() -> None:
    """A share that would not hold the window is lifted, and the other layers give."""
    model = random_model("llama", num_hidden_layers=3)
    rows = tuple(LayerStatistics(i, 1, 1, 1, 1, 0.2, s) for i, s in enumerate((0.5, 0.6, 1.9)))
    calibration = Calibration(fingerprint(model), "measured", PAPER_TAUS, (192,), rows)
    config = ArkvConfig(compression=6.0, context=400, window=40, round_to=1)
    arkv_fx.transform(model, config, calibration, compile="eager")
    report = model.arkv.report()
    first, second, third = (row["slots"] for row in report.rows)
    assert first == second == 44 < third
    assert report.nbytes <= report.full_nbytes / 6
    assert not report.notes, "the budget acts"
    arkv_fx.restore(model)
    arkv_fx.transform(model, config.replace(compression=40.0), calibration, compile="eager")
    report = model.arkv.report()
    assert [row["slots"] for row in report.rows] == [44] * 3
    assert "does not act" in str(report)


def test_shares_that_do_not_hold_the_window_are_not_tried() -> None:
    """They would take more than they say."""
    config = ArkvConfig(compression=14.0, context=1, window=8, sinks=0, round_to=1)
    found = divergences(random_model("llama", num_hidden_layers=1), IDS, None, config)
    assert {option.share for option in found[0]} < set(SHARES)
