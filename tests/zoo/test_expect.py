"""The expectation file, the CSV and the page; and the command on one architecture."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from arkv_fx.cli import app
from arkv_fx.errors import EvaluationError
from arkv_fx.zoo import expect, page
from arkv_fx.zoo.outcome import COLUMNS, blank


def row(name: str, **values: Any) -> dict[str, Any]:
    return blank(name) | {"status": "fused", "sites": 2, "fused": 2} | values


ROWS = [
    row("aa", identity=1.2345e-7, generate=True),
    row("bb", status="unfused", fused=0, reasons="2x odd attention"),
    row("cc", status="no cache", sites=None, fused=None, reasons="recurrent"),
]


def test_what_is_written_is_expected_and_a_change_is_named(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    expect.update(path, ROWS)
    assert expect.mismatches(ROWS, expect.load(path)) == []
    changed = [row("aa", fused=1, status="partly"), row("dd")]
    assert expect.mismatches(changed, expect.load(path)) == [
        "aa: status: expected 'fused', found 'partly'",
        "aa: fused: expected 2, found 1",
        "dd: nothing is expected, found fused",
    ]


def test_other_architectures_and_versions_stay(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps({"1.0": {"aa": {"status": "unfused"}}}))
    expect.update(path, ROWS)
    expect.update(path, [row("aa", fused=1)])
    versions = json.loads(path.read_text())
    assert versions["1.0"] == {"aa": {"status": "unfused"}}
    known = versions[transformers.__version__]
    assert list(known) == ["aa", "bb", "cc"]
    assert known["aa"]["fused"] == 1


def test_a_version_says_what_it_does_otherwise_than_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "e.json"

    def at(version: str, *rows: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.setattr("arkv_fx.zoo.expect.transformers.__version__", version)
        expect.update(path, rows)
        return {name: values["fused"] for name, values in expect.load(path).items()}

    assert at("5.23.0", *ROWS) == {"aa": 2, "bb": 0, "cc": None}
    assert at("5.17.0", row("aa", fused=1), *ROWS[1:]) == {"aa": 1, "bb": 0, "cc": None}
    assert {v: list(part) for v, part in json.loads(path.read_text()).items()} == {
        "5.23.0": ["aa", "bb", "cc"], "5.17.0": ["aa"],
    }  # fmt: skip
    nearest = (("5.16.3", 1), ("5.20.0", 1), ("5.20.1", 2), ("5.24.0", 2), ("6.0.0.dev0", 2))
    for version, fused in nearest:
        assert at(version)["aa"] == fused, version
    # As the neighbour does after all: its own part has nothing left to say.
    assert at("5.17.0", ROWS[0])["aa"] == 2


@pytest.mark.parametrize(
    "text", ["", "[]", '{"5": []}', '{"5": {"aa": 1}}', '{"newest": {"aa": {}}}']
)
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(text)
    for use in (expect.load, lambda p: expect.update(p, ROWS)):
        with pytest.raises(EvaluationError, match=r"e\.json"):
            use(path)
    assert path.read_text() == text


def test_a_file_without_expectations_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text('{"1.0": {}}')
    with pytest.raises(EvaluationError, match="expects nothing of transformers"):
        expect.load(path)


def test_the_page_and_the_csv_hold_every_architecture(tmp_path: Path) -> None:
    text = page.page(ROWS)
    assert "**causal: 2 of 3 have a KV cache that runs here, 1 are fully fused, 2 correct**" in text
    assert "| aa | fused | 2 | 2 | 1.23e-07 |  |  | yes |" in text
    assert "- bb: 2x odd attention" in text
    assert "- cc: no cache: recurrent" in text
    page.write_csv(tmp_path / "z.csv", ROWS)
    with (tmp_path / "z.csv").open() as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == COLUMNS
    assert [r["architecture"] for r in read] == ["aa", "bb", "cc"]


def invoke(*args: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["zoo", *map(str, args)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command(tmp_path: Path) -> None:
    found, expected = tmp_path / "z.json", tmp_path / "e.json"
    expected.write_text(json.dumps({transformers.__version__: {"mamba": {"status": "fused"}}}))
    shown = invoke("mamba", "--json", found, "--page", tmp_path / "z.md")
    assert "causal: 0 of 1 have a KV cache" in shown
    assert json.loads(found.read_text())[0]["status"] == "no cache"
    assert "mamba: no cache" in (tmp_path / "z.md").read_text()
    shown = invoke("mamba", "--expect", expected, code=1)
    assert "mamba: status: expected 'fused', found 'no cache'" in shown
    invoke("mamba", "--expect", expected, "--update-expectations")
    invoke("mamba", "--expect", expected)


def test_the_command_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    assert "gpt2" in invoke("--list").split()
    assert "give one of them" in invoke("--quick", "--expect", tmp_path / "e.json", code=1)
    assert "give that too" in invoke("--update-expectations", code=1)
    assert "'llamma'" in invoke("llamma", code=1)
