"""Calibration: the published formulas literally, the normalised ones' invariances, the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import arkv_fx
from arkv_fx.calibration import Calibration
from arkv_fx.config import PAPER_TAUS, ArkvConfig
from arkv_fx.costs.attention_statistics import (
    Moments,
    measure,
    observed_attention,
    oq_ratios,
    oq_score,
)
from arkv_fx.errors import CalibrationError
from arkv_fx.evaluation.plots import plot_calibration
from arkv_fx.models import random_model

CONFIG = ArkvConfig(budget=64, window=8, calibration="normalised")


def attention(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, length, 16, generator=generator)
    k = torch.randn(batch, 2, length, 16, generator=generator)
    return observed_attention(q, k, None, 0.25, 8)


def test_observed_attention_is_the_last_rows_of_plain_attention() -> None:
    q, k = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 30, 16)
    probs, real = observed_attention(q, k, None, 0.3, 8)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    logits = logits.masked_fill(~torch.ones(30, 30).tril().bool(), float("-inf"))
    torch.testing.assert_close(probs, logits.softmax(-1)[..., -8:, :22], rtol=1e-5, atol=1e-6)
    assert real.all()


def test_published_statistics_are_the_paper_s_sums() -> None:
    probs, real = attention(2, 40)
    found = measure(probs, real, published=True)
    entropy = variance = kurtosis = 0.0
    for row in probs.flatten(0, 1).double():  # [W, N] of one head
        entropy -= float((row * row.log()).sum())
        for column in row.T:
            centred = column - column.mean()
            m2, m4 = float((centred**2).mean()), float((centred**4).mean())
            variance += m2
            kurtosis += m4 / m2**2
    assert found.entropy == pytest.approx(entropy, rel=1e-4)
    assert found.variance == pytest.approx(variance, rel=1e-4)
    assert found.kurtosis == pytest.approx(kurtosis, rel=1e-3)
    t1, t2, t3 = PAPER_TAUS
    score = entropy ** (1 / t1) * variance ** (1 / t2) * kurtosis ** (1 / t3)
    assert oq_score(found, PAPER_TAUS) == pytest.approx(score, rel=1e-3)


def test_paper_ratio_is_score_over_the_largest() -> None:
    moments = [Moments(4.0, 0.1, 9.0), Moments(8.0, 0.4, 11.0)]
    low, high = oq_ratios([0, 1], moments, PAPER_TAUS, "paper", 0.4)
    assert high.oq_ratio == 1.0
    assert low.oq_ratio == pytest.approx(low.score / high.score)


def test_normalised_ratios_keep_the_configured_mean() -> None:
    moments = [Moments(0.4, 1.0, 9.0), Moments(0.6, 2.0, 11.0), Moments(0.8, 3.0, 20.0)]
    rows = oq_ratios([0, 1, 2], moments, PAPER_TAUS, "normalised", 0.3)
    assert sum(r.oq_ratio for r in rows) / 3 == pytest.approx(0.3)
    assert len({round(r.oq_ratio, 6) for r in rows}) == 3


@pytest.mark.parametrize("published", [False, True])
def test_only_the_normalised_statistics_ignore_batch_and_length(published: bool) -> None:
    short, long = attention(1, 200), attention(1, 1600)
    twice = tuple(torch.cat([x, x]) for x in short)
    one = measure(*short, published=published)
    double = measure(*twice, published=published)  # type: ignore[arg-type]
    other = measure(*long, published=published)
    for name in ("entropy", "variance", "kurtosis"):
        a, b, c = (getattr(m, name) for m in (one, double, other))
        if published:  # the negative control: sums grow with the batch
            assert b == pytest.approx(2 * a, rel=1e-4)
        else:
            assert b == pytest.approx(a, rel=1e-4)
            assert c == pytest.approx(a, rel=0.15)
    if published:
        assert other.kurtosis > 5 * one.kurtosis


def test_padding_does_not_move_the_normalised_statistics() -> None:
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    alone = measure(*observed_attention(q, k, None, 0.3, 8), published=False)
    pad = 15
    q, k = (torch.cat([torch.randn(1, x.shape[1], pad, 16), x], 2) for x in (q, k))
    mask = torch.ones(1, 1, 55, 55).tril().bool()
    mask[..., :pad] = False
    padded = measure(*observed_attention(q, k, mask, 0.3, 8), published=False)
    assert padded.entropy == pytest.approx(alone.entropy, rel=1e-4)
    assert padded.variance == pytest.approx(alone.variance, rel=1e-4)
    assert padded.kurtosis == pytest.approx(alone.kurtosis, rel=1e-3)


def test_calibrate_save_load_and_use(tmp_path: Path) -> None:
    model = random_model("llama")
    ids = torch.randint(1, 128, (1, 60), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    found = arkv_fx.calibrate(model, [ids, ids[:, :40]], CONFIG)
    assert torch.equal(model(ids).logits, before)  # restored
    assert [r.layer for r in found.layers] == [0, 1]
    assert found.samples == (60, 40)
    assert all(math.isfinite(r.score) and r.score > 0 for r in found.layers)

    path = tmp_path / "c.json"
    found.save(path)
    again = Calibration.load(path)
    assert again == found
    arkv_fx.transform(model, CONFIG, again, compile="eager")
    tiers = [row["tiers"] for row in model.arkv.report().rows]
    for row, layer in zip(tiers, found.layers, strict=True):
        assert row[CONFIG.tiers[0]] == round(layer.oq_ratio * (64 - 12))

    plot_calibration(found, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_another_model_s_calibration_is_refused() -> None:
    ids = torch.randint(1, 128, (1, 30))
    found = arkv_fx.calibrate(random_model("llama"), ids, CONFIG)
    for other in (random_model("llama", seed=1), random_model("qwen3")):
        with pytest.raises(CalibrationError, match="made for"):
            arkv_fx.transform(other, CONFIG, found)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: "not json",
        lambda d: json.dumps([1]),
        lambda d: json.dumps({**d, "schema": 99}),
        lambda d: json.dumps({k: v for k, v in d.items() if k != "layers"}),
        lambda d: json.dumps({**d, "layers": [{**d["layers"][0], "oq_ratio": 7}]}),
        lambda d: json.dumps({**d, "layers": [{**d["layers"][0], "share": 0}]}),
        lambda d: json.dumps({**d, "layers": [{"layer": 0}]}),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "c.json"
    Calibration("m", "paper", PAPER_TAUS, (9,), oq_ratios([0], [Moments(1, 1, 1)], PAPER_TAUS,
                "paper", 0.5)).save(path)  # fmt: skip
    path.write_text(damage(json.loads(path.read_text())))  # type: ignore[operator]
    with pytest.raises(CalibrationError, match=r"c\.json"):
        Calibration.load(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(tmp_path / "missing.json")


def test_too_short_a_prompt_is_refused() -> None:
    with pytest.raises(CalibrationError, match="tokens >= 2"):
        arkv_fx.calibrate(random_model("llama"), torch.ones(1, 1, dtype=torch.long), CONFIG)
