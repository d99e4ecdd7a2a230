"""A calibration on a shipped text is kept, and found again by ``transform``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tokenizer

import arkv_fx
from arkv_fx import kept
from arkv_fx.calibration import Calibration, fingerprint
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import CalibrationError, ConfigError
from arkv_fx.models import load, random_model

CONFIG = ArkvConfig(compression=4.0, context=192, window=8, round_to=1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARKV_CACHE", str(tmp_path))
    monkeypatch.setattr("arkv_fx.transforming.find", kept.find)
    return tmp_path / "calibrations"


def model(seed: int = 0) -> Any:
    return random_model("llama", vocab_size=256, seed=seed)


@pytest.fixture
def calibrated(folder: Path) -> Calibration:
    return arkv_fx.calibrate(model(), config=CONFIG, tokenizer=tokenizer())


def given(to: Any, config: ArkvConfig, calibration: Any = None) -> Calibration | None:
    """What a model is transformed with."""
    found: Calibration | None = arkv_fx.transform(
        to, config, calibration, compile="eager"
    ).arkv.calibration
    arkv_fx.restore(to)
    return found


def test_what_was_calibrated_is_found(
    calibrated: Calibration, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert calibrated.samples == (192,)
    (file,) = folder.iterdir()
    assert Calibration.load(file) == calibrated
    with caplog.at_level(logging.INFO, logger="arkv_fx"):
        assert given(model(), CONFIG) == calibrated
    assert f"calibrated on 192 tokens, from {file}" in caplog.text
    assert given(model().to(torch.bfloat16), CONFIG.replace(compression=8.0)) == calibrated
    assert given(model(), CONFIG.replace(bytes=4000)) == calibrated


def test_others_are_not_found(calibrated: Calibration) -> None:
    assert given(model(), CONFIG, False) is None
    assert given(model(seed=1), CONFIG) is None, "other weights"
    for change in ({"budget": 64}, {"window": 16}, {"tiers": ("int8",)}, {"calibration": "paper"}):
        assert given(model(), CONFIG.replace(**change)) is None, change


def test_weights_are_read_only_where_there_is_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> str:
        raise AssertionError("weights were read")

    monkeypatch.setattr(kept, "fingerprint", refuse)
    assert given(model(), CONFIG) is None
    arkv_fx.calibrate(model(), config=CONFIG, tokenizer=tokenizer())
    with pytest.raises(AssertionError, match="weights were read"):
        given(model(), CONFIG)


def test_a_damaged_file_is_left_out_by_name(
    calibrated: Calibration, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file,) = folder.iterdir()
    file.write_text("{}")
    assert given(model(), CONFIG) is None
    assert str(file) in caplog.text and "left out" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("in the way")
    found = arkv_fx.calibrate(model(), config=CONFIG, tokenizer=tokenizer())
    assert found.layers and "set ARKV_CACHE" in caplog.text


def test_what_is_shipped_is_found_where_nothing_of_ones_own_is(
    calibrated: Calibration, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = folder.iterdir()
    monkeypatch.setattr(kept, "SHIPPED", tmp_path / "shipped")
    kept.SHIPPED.mkdir()
    file.rename(kept.SHIPPED / file.name)
    assert given(model(), CONFIG) == calibrated
    own = arkv_fx.calibrate(model(), torch.ones(1, 99, dtype=torch.long), CONFIG)
    own.save(file)
    assert given(model(), CONFIG) == own != calibrated


@pytest.mark.parametrize("name", ["smollm2", pytest.param("gemma3-270m", marks=pytest.mark.slow)])
def test_packaged_models_have_one_for_the_default_options(name: str) -> None:
    """Options that change their files' names want new files."""
    network, _ = load(name)
    found = kept.find(network, ArkvConfig())
    assert found is not None and found.samples[0] > 1000
    found.check(fingerprint(network), network.config.num_hidden_layers)


def test_prompts_or_a_tokenizer() -> None:
    for arguments in ({}, {"input_ids": torch.ones(1, 99), "tokenizer": tokenizer()}):
        with pytest.raises(CalibrationError, match="or a tokenizer"):
            arkv_fx.calibrate(model(), **arguments)
    with pytest.raises(CalibrationError, match="give a tokenizer of transformers"):
        arkv_fx.calibrate(model(), tokenizer="smollm2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="None or False"):
        arkv_fx.transform(model(), CONFIG, True)
