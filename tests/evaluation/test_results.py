"""Rows on disk and on the terminal."""

from pathlib import Path

import pytest
from rich.console import Console

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation import results

ROWS = [
    {"model": "m", "method": "full", "compression": None, "kl": 0.0},
    {"model": "m", "method": "evict", "compression": 4.0, "kl": 0.01234},
]


def test_rows_come_back(tmp_path: Path) -> None:
    results.write(tmp_path / "r.json", ROWS)
    assert results.read(tmp_path / "r.json") == ROWS


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"a": [1]}]'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(EvaluationError, match="rows"):
        results.read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be read"):
        results.read(tmp_path / "none.json")


def test_the_table_puts_what_is_common_below(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=80).print(results.table("Title", ROWS))
    shown = capsys.readouterr().out
    assert shown.count("evict") == 1 and "0.0123" in shown and "model m" in shown
    Console(width=80).print(results.table("Nothing", []))
