"""Rows that a report reads: of both forms on disk, and refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import measured_rows
import pytest
import tiny_model

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation import results
from arkv_fx.evaluation.fidelity import fidelity
from arkv_fx.evaluation.pages.measured import KINDS, read_all
from arkv_fx.evaluation.passkey import passkey
from arkv_fx.evaluation.task_runs import run_tasks
from arkv_fx.models import random_model


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_the_commands_write_is_read(tmp_path: Path) -> None:
    """All three kinds, as a model of two layers gives them."""
    model, tokenizer = random_model("llama", vocab_size=256), tiny_model.tokenizer()
    ids = tokenizer("A cat sat on a mat. " * 20, return_tensors="pt").input_ids[0]
    options: dict[str, Any] = {"methods": ["full", "uncalibrated:window=8"]}
    written = {
        "fidelity": fidelity(model, {"t": ids}, context=100, steps=2, **options),
        "passkey": passkey(
            model, tokenizer, contexts=[300], prompts=1, batch=1, fillers=["prose"], **options
        ),
    }
    for kind, rows in written.items():
        results.write(tmp_path / f"{kind}.json", rows)
    written["tasks"] = run_tasks(
        model, tokenizer, {"t": "A cat sat on a mat. It slept. " * 200}, tasks=["passkey"],
        contexts=[300], prompts=1, path=tmp_path / "tasks.jsonl", **options,
    )  # fmt: skip
    files = sorted(tmp_path.iterdir())
    found = read_all([*files, files[0]])
    assert found.rows == written and list(found.rows) == list(KINDS)
    assert found.repeated == len(written[files[0].stem])


ROWS = {"fidelity": measured_rows.fidelity, "passkey": measured_rows.passkey,
        "tasks": measured_rows.task}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_needed(kind: str, tmp_path: Path) -> None:
    good = ROWS[kind]()
    for key in KINDS[kind]:
        path = lines(tmp_path / "rows", good, {k: v for k, v in good.items() if k != key})
        with pytest.raises(EvaluationError, match=r"rows, line 2: ") as error:
            read_all([path])
        assert f"lacks {key}" in str(error.value) or "a row of none of" in str(error.value)
        path = lines(tmp_path / "rows", {**good, key: ["x"]})
        with pytest.raises(EvaluationError, match=rf"rows, line 1: {key}=\['x'\]: must be"):
            read_all([path])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has not one row"),
        ("[]", "has not one row"),
        ('{"a": 1}', "line 1: is a row of none of .*: it has 'a'"),
        ("{}", "line 1: is a row of none of .*: it has nothing"),
        ("3", "line 1: is no row"),
        ('[\n1]', "line 2: is no row"),
        ('\n\n{"task": "quo', "line 3: is no JSON"),
        ('[\n{"a": 1},\n{]', "line 3: is no JSON"),
        ("[" * 100000, "cannot be read as a row"),
        ("1" * 5000, "cannot be read as a row"),
    ],
)  # fmt: skip
def test_what_is_no_row_is_refused_by_its_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(text)
    with pytest.raises(EvaluationError, match=rf"rows(, |: ){says}|{says}"):
        read_all([tmp_path / "rows"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bytes": 0}, "bytes=0: must be a whole number above 0"),
        ({"bytes": True}, "bytes=True"),
        ({"bytes": 10**400}, "bytes=1000"),
        ({"accuracy": 10**400}, "accuracy=1000"),
        ({"accuracy": "0.5"}, "accuracy='0.5': must be a number"),
        ({"compression": 0}, "compression=0: must be"),
        ({"more": {}}, "'more' holds more than one value"),
        ({"task": "\ud800"}, "'task' cannot be written"),
    ],
)
def test_values_that_no_row_has(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows", measured_rows.task(), measured_rows.task(**changes))
    with pytest.raises(EvaluationError, match=f"rows, line 2: {says}"):
        read_all([path])


def test_more_is_found_than_was_asked_for(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows", measured_rows.passkey(correct=5))
    with pytest.raises(EvaluationError, match="correct=5 of total=4"):
        read_all([path])


def test_lines_of_a_list_and_other_ends_of_lines(tmp_path: Path) -> None:
    """A text may hold what else ends a line; a list's rows are counted where they begin."""
    odd = measured_rows.task(text="a\u2028b\x85c")
    path = tmp_path / "rows"
    path.write_text(json.dumps(odd, ensure_ascii=False) + "\n\n" + json.dumps(measured_rows.task()))
    assert len(read_all([path]).rows["tasks"]) == 2
    results.write(path, [odd, measured_rows.task(bytes=-1)])
    with pytest.raises(EvaluationError, match=f"line {3 + len(odd) + 1}: bytes=-1"):
        read_all([path])


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("none", "binary", "."):
        with pytest.raises(EvaluationError, match="cannot be read as rows"):
            read_all([tmp_path / name])
