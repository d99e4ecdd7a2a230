"""Fidelity rows on a tiny model."""

from pathlib import Path

import pytest
import torch

from arkv_fx import ArkvConfig, calibrate, restore, transform
from arkv_fx.errors import EvaluationError, UnknownOptionError
from arkv_fx.evaluation.calibrations import calibrations
from arkv_fx.evaluation.fidelity import Entry, entries, fidelity, make_configs, means
from arkv_fx.evaluation.methods import FullCache
from arkv_fx.evaluation.results import Row
from arkv_fx.models import load, random_model

SCHEMA = [
    "model", "text", "method", "compression", "context", "steps", "bytes", "full_bytes",
    "kl_mean", "top1", "ppl_ratio", "seconds",
]  # fmt: skip
TEXTS = {
    name: torch.randint(0, 128, (420,), generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate("ab")
}


MODEL = random_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return fidelity(
        MODEL, TEXTS, context=400, steps=6, compressions=[2, 4],
        methods=["full", "evict:window=8", "uniform-int8:window=8", "paper-512"], name="tiny",
    )  # fmt: skip


def pick(rows: list[Row], method: str) -> list[Row]:
    return [row for row in rows if row["method"].startswith(method)]


def test_rows_have_the_schema_and_every_entry_once_per_text(rows: list[Row]) -> None:
    assert all(list(row) == SCHEMA for row in rows)
    assert len(rows) == 2 * (1 + 2 + 2 + 1)
    assert {row["full_bytes"] for row in rows} == {400 * 2 * 32 * 2}


def test_the_full_method_agrees_with_the_full_cache(rows: list[Row]) -> None:
    for row in pick(rows, "full"):
        assert abs(row["kl_mean"]) < 1e-9
        assert row["top1"] == 1
        assert row["ppl_ratio"] == pytest.approx(1, abs=1e-4)


def test_a_paper_budget_beyond_the_context_keeps_all_but_the_fp8_error(rows: list[Row]) -> None:
    for row in pick(rows, "paper"):
        assert 0 < row["kl_mean"] < 0.1


def test_what_is_measured_is_what_transform_gives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a calibration that is given the default's is that of the first prompt."""
    monkeypatch.setattr("arkv_fx.huggingface.first_prompt.LEAST", 256)
    monkeypatch.setenv("ARKV_CACHE", str(tmp_path))
    model = random_model("llama")
    chosen = [Entry(method, 4) for method in ("default", "uncalibrated", "default:window=8")]
    configs = make_configs(chosen, FullCache.of(model), 400, 6)
    methods = {entry.name: entry.method for entry in chosen}
    prompts = torch.stack([ids[:400] for ids in TEXTS.values()])
    found = calibrations(model, prompts, configs, methods, None)
    assert found["uncalibrated@4"] is None
    for name in ("default@4", "default:window=8@4"):
        transform(model, configs[name], compile="eager")
        with torch.no_grad():
            model(prompts)
        assert found[name] == model.arkv.calibration is not None
        restore(model)
    assert found["default@4"] != found["default:window=8@4"]
    given = found["default@4"]
    again = calibrations(model, prompts, configs, methods, given)
    assert again == {**dict.fromkeys(configs, given), "uncalibrated@4": None}
    assert calibrations(model, prompts[:, :200], configs, methods, None)["default@4"] is None


def test_eviction_differs_and_more_so_with_fewer_bytes(rows: list[Row]) -> None:
    at2, at4 = means(pick(rows, "evict"))
    assert 1e-4 < at2["kl_mean"] < at4["kl_mean"]
    assert 1.8 < at4["full_bytes"] / at4["bytes"] and at4["bytes"] < at2["bytes"]
    int8 = means(pick(rows, "uniform-int8"))[0]
    assert int8["kl_mean"] < at2["kl_mean"]


def test_a_text_alone_gives_what_it_gives_in_a_batch(rows: list[Row]) -> None:
    alone = fidelity(
        MODEL, {"b": TEXTS["b"]}, context=400, steps=6, compressions=[2],
        methods=["evict:window=8"],
    )  # fmt: skip
    batched = pick(rows, "evict")[1]
    assert batched["text"] == "b"
    assert alone[0]["kl_mean"] == pytest.approx(batched["kl_mean"], rel=1e-3)


def test_means_average_over_texts(rows: list[Row]) -> None:
    averaged = means(rows)
    assert len(averaged) == len(rows) // 2
    assert averaged[0]["text"] == "mean of 2"


def test_methods_with_their_own_size_run_once() -> None:
    found = entries(["full", "evict", "evict", "paper-512:sinks=4"], [4, 8, 4])
    assert [(e.method, e.compression) for e in found] == [
        ("full", None), ("evict", 4), ("evict", 8), ("paper-512:sinks=4", None),
    ]  # fmt: skip


def test_refusals() -> None:
    model = MODEL
    with pytest.raises(EvaluationError, match="'a' has 420 tokens"):
        fidelity(model, TEXTS, context=420, steps=1)
    with pytest.raises(EvaluationError, match="no text"):
        fidelity(model, {}, context=4, steps=1)
    with pytest.raises(UnknownOptionError, match="unknown method"):
        fidelity(model, TEXTS, context=64, steps=1, methods=["best"])
    assert not hasattr(model, "arkv")


@pytest.mark.slow
def test_smollm2_quantization_beats_eviction() -> None:
    from arkv_fx import texts

    model, tokenizer = load("smollm2")
    ids = {"esther": tokenizer(texts.read("esther"), return_tensors="pt").input_ids[0]}
    found = fidelity(model, ids, context=1024, steps=16, methods=["full", "evict", "default"])
    full, evict, default = found
    assert abs(full["kl_mean"]) < 1e-6
    assert default["kl_mean"] < evict["kl_mean"]  # measured: .030 against .065


@pytest.mark.slow
def test_smollm2_layers_measured_on_one_text_pay_on_another() -> None:
    from arkv_fx import texts

    model, tokenizer = load("smollm2")
    ids = {
        name: tokenizer(texts.read(name), return_tensors="pt").input_ids[0]
        for name in ("moby_dick", "esther")
    }
    config = ArkvConfig(compression=8.0, window_format="bf16")  # of float32: 4x against bf16
    calibration = calibrate(model, ids["moby_dick"][None, :1024], config)
    plain, measured = fidelity(
        model, {"esther": ids["esther"]}, context=1024, steps=32,
        methods=["uncalibrated", "default"], calibration=calibration,
    )  # fmt: skip
    assert measured["bytes"] <= plain["bytes"]
    assert measured["kl_mean"] < 0.6 * plain["kl_mean"]
