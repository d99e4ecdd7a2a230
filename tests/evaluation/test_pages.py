"""The report and the commands that write pages: what is shown, what is escaped, what is refused."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import measured_rows
import pytest
import tiny_model
from typer.testing import CliRunner, Result

from arkv_fx.calibration import Calibration, LayerStatistics
from arkv_fx.cli import app
from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.pages import render, sections
from arkv_fx.evaluation.pages.looks import DIFFERENT, looks
from arkv_fx.evaluation.pages.measured_page import report_page
from arkv_fx.evaluation.pages.pictures import METRICS, on_front
from arkv_fx.evaluation.pages.sheets import cell, sheet

EVIL = '</script><script>alert("1")</script><b>&amp;'
PLOTLY = "/* plotly */"


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the five megabytes that draw them."""
    monkeypatch.setattr("arkv_fx.evaluation.pages.measured_page.plotly_script", lambda: PLOTLY)


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def calibration() -> Calibration:
    rows = [LayerStatistics(i, 1, 1, 1, 1, 0.25 * i, 0.5 + i) for i in range(2)]
    return Calibration("Llama-0", "output", (1, 1, 1), (64,), tuple(rows))


def pictures_of(page: str) -> Any:
    found = re.search(r'id="pictures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    rows = [
        measured_rows.task(task=EVIL, method=EVIL, model=EVIL, calibration=EVIL),
        measured_rows.fidelity(text=EVIL, method=EVIL),
        measured_rows.passkey(filler=EVIL),
    ]
    page = report_page([written(tmp_path / "r", *rows)], calibration(), EVIL)
    assert EVIL not in page and "<b>" not in page
    # Of pictures, plotly and the page's own.
    assert page.count("<script") == page.count("</script>") == 3 and PLOTLY in page
    drawn = pictures_of(page)[0]["accuracy"]["data"][1]
    assert "<script>" not in drawn["hovertext"][0] and "&lt;script&gt;" in drawn["name"]
    assert "default-src 'none'" in page and not re.search(r"(src|href)=\"(?!#)", page)


def test_every_kind_has_its_part(tmp_path: Path) -> None:
    rows = [
        *(measured_rows.task(tokens=n, bytes=n, full_bytes=4 * n) for n in (512, 1024)),
        *(measured_rows.fidelity(text=text) for text in "ab"),
        measured_rows.passkey(),
    ]
    path = written(tmp_path / "r", *rows, rows[0])
    page = report_page([path], calibration(), "c.json")
    assert re.findall(r'<section id="(\w+)"', page) == [
        "tasks", "fidelity", "passkey", "memory", "calibration"
    ]  # fmt: skip
    assert "rows 2 of fidelity, 1 of passkey, 2 of tasks; 1 stood there more than once" in page
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == [
        "quote, 512 tokens", "quote, 1024 tokens", "mean of 2 texts, 512 tokens", "a, 512 tokens",
        "b, 512 tokens", "m, float32, measured by tasks", "share of the budget", "OQ ratio",
    ]  # fmt: skip
    memory = pictures_of(page)[5][""]["data"]
    assert memory[0]["y"] == [4 * n / 2**20 for n in (512, 1024)]
    assert memory[1]["x"] == [512, 1024] and memory[1]["y"] == [n / 2**20 for n in (512, 1024)]
    assert "measured by fidelity: all rows are of 512 tokens, which cannot tell" in page


def test_what_cannot_tell_of_memory_says_so(tmp_path: Path) -> None:
    page = report_page([written(tmp_path / "r", measured_rows.passkey())])
    assert "No row says how many bytes a cache took." in page and '"plot"' not in page


def test_only_rows_of_the_same_are_drawn_together() -> None:
    rows = [measured_rows.task(seed=seed, task=task) for seed in (0, 1) for task in ("a", "b")]
    found = sections.tasks(rows, looks(["default"]))
    assert [picture.title for picture in found.pictures] == [
        "seed 0, a, 512 tokens", "seed 0, b, 512 tokens", "seed 1, a, 512 tokens",
        "seed 1, b, 512 tokens",
    ]  # fmt: skip


def test_the_front_goes_by_measured_bytes() -> None:
    small, good, beaten = (
        measured_rows.fidelity(bytes=size, kl_mean=kl, method=method)
        for size, kl, method in ((100, 0.5, "small"), (200, 0.1, "good"), (300, 0.1, "beaten"))
    )
    none = measured_rows.fidelity(bytes=1, kl_mean=float("nan"), method="none")
    divergence = METRICS["fidelity"][0]
    assert on_front([beaten, none, good, small], divergence) == [small, good]
    (picture,) = sections.fidelity([small, good, beaten, none], _looks(4)).pictures
    assert "no number of none 4x, which are not drawn" in picture.said
    assert "beaten by none in KL(full" in picture.said and "small 4x, good 4x" in picture.said
    (table,) = sections.fidelity([small, good, beaten], _looks(3)).sheets
    place = table.columns.index("on the front of")
    assert [row[place].text for row in table.rows] == ["kl_mean, top1, ppl_ratio", "kl_mean", "-"]


def _looks(count: int) -> Any:
    return looks(["small", "good", "beaten", "none"][:count])


def test_a_mean_is_of_methods_that_were_measured_on_the_same_texts() -> None:
    rows = [measured_rows.fidelity(text=text) for text in "ab"]
    styles = looks(["default", "evict"])
    assert len(sections.fidelity(rows, styles).pictures) == 3
    assert len(sections.fidelity([*rows, {**rows[0], "method": "evict"}], styles).pictures) == 2
    for changes in ({"ppl_ratio": 0.0}, {"kl_mean": float("inf")}, {"bytes": 7}):
        assert len(sections.fidelity([rows[0], {**rows[1], **changes}], styles).pictures) == 2


def test_many_methods_look_different() -> None:
    found = looks(str(i) for i in range(DIFFERENT)).values()
    assert len({(look.colour, look.symbol) for look in found}) == DIFFERENT == 42


def test_cells_sort_by_their_numbers() -> None:
    assert [cell(x).number for x in (3, 0.5, None, "a", True, float("inf"))] == [
        "3", "0.5", "", "", "", ""
    ]  # fmt: skip
    rows = [{"a": 1, "b": "x", "c": None, "d": 1.0}, {"a": 1, "b": "y", "c": 2.0, "d": 0.5}]
    table = sheet("n", "t", rows)
    assert (table.same, table.columns) == ("a 1", ("b", "c", "d"))
    assert table.numeric == (False, True, True)
    assert [cell.text for cell in table.rows[1]] == ["y", "2", "0.500"]
    inf = sheet("n", "t", [{"a": float("inf")}])
    assert inf.rows[0][0].text == "inf"


def test_pictures_are_what_plotly_takes(tmp_path: Path) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    rows = [measured_rows.task(tokens=n) for n in (512, 1024)]
    page = report_page([written(tmp_path / "r", *rows, measured_rows.fidelity())], calibration())
    for picture in pictures_of(page):
        for variant in picture.values():
            graph_objects.Figure(data=variant["data"], layout=variant["layout"])


@pytest.mark.parametrize("package", ["jinja2", "plotly.offline"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EvaluationError, match=r"pip install 'arkv-fx\[report\]'"):
        render.require_templates() if package == "jinja2" else render.plotly_script()


# The commands


def run(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


DOCUMENTED = [
    line
    for name in ("README.md", "docs/report.md")
    for line in (Path(__file__).parents[2] / name).read_text().splitlines()
    if line.startswith(("arkv eval report ", "arkv view "))
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files are that the documents name, small ones."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "tasks.jsonl", measured_rows.task())
    written(tmp_path / "fidelity.json", measured_rows.fidelity())
    calibration().save(tmp_path / "smollm2.json")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "prompt_4k.txt").write_text("<script>A cat sat.</script> " * 6)
    return tmp_path


@pytest.mark.parametrize("line", DOCUMENTED)
def test_what_the_documents_say(line: str, folder: Path) -> None:
    words = shlex.split(line.replace("--model smollm2", f"--model {tiny_model.save(folder / 'm')}"))
    page = Path(words[words.index("-o") + 1])
    assert page.name in run(*words[1:]).stderr.replace("\n", "")
    text = page.read_text()
    if words[1] == "view":
        assert "168 tokens of a prompt and" in text and text.count("<script") == 2
    else:
        assert "Rows of arkv eval tasks" in text and text.count("<script") == 3
    assert ("Llama-0" in text) == ("--calibration" in words)


def test_the_report_is_refused_what_is_no_row(folder: Path) -> None:
    rows, page = folder / "tasks.jsonl", folder / "r.html"
    before = rows.read_text()
    (folder / "note").write_text("<html>")
    for args, says in (
        ((rows, "-o", rows), "holds rows"),
        ((rows, "-o", folder), "cannot be written"),
        ((folder / "note", "-o", page), "note, line 1: is no JSON"),
        ((rows, "-o", page, "--calibration", rows), "schema None is not"),
    ):
        assert says in " ".join(run("eval", "report", *args, code=1).stderr.split())
    assert rows.read_text() == before and not page.exists()


def test_a_view_is_refused_before_anything_is_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arkv_fx.models.load", lambda *_: pytest.fail("the model was loaded"))
    prompt = folder / "examples" / "prompt_4k.txt"
    args = ["view", "--model", "m", "--prompt-file", prompt]
    assert "is the prompt" in run(*args, "-o", prompt, code=1).stderr
    assert "cannot be written" in " ".join(run(*args, "-o", folder, code=1).stderr.split())
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "arkv-fx[report]" in run(*args, "-o", folder / "v.html", code=1).stderr
