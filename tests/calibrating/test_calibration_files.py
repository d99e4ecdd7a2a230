"""A calibration file says what a calibration says, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arkv_fx.calibration import Calibration, LayerStatistics, fingerprint
from arkv_fx.errors import CalibrationError, ConfigError
from arkv_fx.models import random_model

ROWS = tuple(LayerStatistics(i, 1.0, 1.0, 1.0, 1.0, 0.3, s, 0.1) for i, s in ((0, 0.5), (1, 1.5)))
GOOD = Calibration("Llama-0", "measured", (1.0, 2.0, 3.0), (100,), ROWS)


def damaged(change: Callable[[dict[str, Any]], Any], path: Path) -> Path:
    GOOD.save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def row(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["layers"][0].update(changes)


@pytest.mark.parametrize(
    "change, says",
    [
        (row(layer="0"), "layer '0': a whole number"),
        (row(layer=None), "layer None: a whole number"),
        (row(layer=True), "layer True: a whole number"),
        (row(layer=-1), "layer -1: a whole number"),
        (row(layer=1), "layer 1 is there twice"),
        (row(share=1e9), "shares sum to 1e.09 where 2 were"),
        (lambda data: [r.update(share=1e-9) for r in data["layers"]], "sum to 2e-09 where 2 were"),
        (row(share=0), "layer 0, share 0: above 0"),
        (row(share=float("inf")), "layer 0, share inf: a number"),
        (row(share="1"), "layer 0, share '1': a number"),
        (row(oq_ratio=1.5), "layer 0, oq_ratio 1.5: between 0 and 1"),
        (row(oq_ratio=float("nan")), "layer 0, oq_ratio nan: a number"),
        (row(entropy="x"), "layer 0, entropy 'x': a number"),
        (row(divergence=float("nan")), "layer 0, divergence nan"),
        (lambda data: data["layers"].pop(), "2 layers were written, 1 are there"),
        (lambda data: data.update(layers=[]), "2 layers were written, 0 are there"),
        (lambda data: data.update(mode="best"), "mode 'best': there are output, measured"),
        (lambda data: data.update(taus=[1, float("nan"), 1]), "taus .*: three numbers > 0"),
        (lambda data: data.update(taus=[1, 1]), "taus .*: three numbers > 0"),
        (lambda data: data.update(samples=["long"]), "samples .*: numbers of tokens"),
        (lambda data: data.pop("count"), "count"),
        (lambda data: data.update(unit="slots"), "unit 'slots': there are bytes, tokens"),
        (row(costs=[[0.25, 0.1]]), "layer 0, costs .0.25, 0.1.: size, OQ ratio and error"),
        (row(costs=[[0.25, 1.1, 0.0]]), "layer 0, costs .*: size, OQ ratio and error"),
        (row(costs=[[0.0, 0.1, 0.0]]), "layer 0, costs .*: size, OQ ratio and error"),
        (row(costs=[[0.25, 0.1, float("nan")]]), "layer 0, costs .*: size, OQ ratio and error"),
        (lambda data: data.update(schema=2), "schema 2 is not the 4"),
    ],
)
def test_what_no_calibration_says(change: Any, says: str, tmp_path: Path) -> None:
    path = damaged(change, tmp_path / "c.json")
    with pytest.raises(CalibrationError, match=f"c.json: .*{says}"):
        Calibration.load(path)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.75, 1.0)])
def test_not_all_need_be_given_out(shares: tuple[float, ...], tmp_path: Path) -> None:
    """A layer that gains nothing leaves its part."""

    def change(data: dict[str, Any]) -> None:
        for each, share in zip(data["layers"], shares, strict=True):
            each["share"] = share

    found = Calibration.load(damaged(change, tmp_path / "c.json"))
    assert tuple(each.share for each in found.layers) == shares


def test_a_path_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"path=5 is of type int: give the path"):
        Calibration.load(5)  # type: ignore[arg-type]


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = damaged(lambda data: None, tmp_path / "c.json")
    assert Calibration.load(path) == GOOD


def test_costs_are_kept(tmp_path: Path) -> None:
    rows = tuple(replace(row, costs=((0.25, 0.1, 0.5), (0.5, 0.1, 0.25))) for row in ROWS)
    known = replace(GOOD, mode="output", layers=rows, unit="tokens")
    known.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == known


def test_a_file_of_schema_3_is_read(tmp_path: Path) -> None:
    """It has no costs, so its shares stay as they are, whatever the budget."""

    def older(data: dict[str, Any]) -> None:
        del data["unit"]
        for row in data["layers"]:
            del row["costs"]
        data["schema"] = 3

    found = Calibration.load(damaged(older, tmp_path / "c.json"))
    assert found == GOOD
    assert found.at(0.1) is found


@pytest.mark.parametrize("text", ['{"schema": 3, "schema": 3}', "[" * 100_000])
def test_what_json_lets_pass(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CalibrationError, match="cannot be read as a calibration"):
        Calibration.load(tmp_path / "c.json")


def test_a_fingerprint_sees_every_weight() -> None:
    model = random_model("llama")
    before = fingerprint(model)
    assert before == fingerprint(random_model("llama"))
    assert before == fingerprint(random_model("llama").to(torch.bfloat16))
    assert before != fingerprint(random_model("llama", seed=1))
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for place in (0, len(flat) // 2, -1):
            held = flat[place].clone()
            flat[place] += 1
            assert fingerprint(model) != before
            flat[place] = held
    first = next(model.parameters()).data
    first[[0, 1]] = first[[1, 0]]  # the same numbers in other places
    assert fingerprint(model) != before
