"""The folder appears whole or not at all, and nothing stays of a run that failed or was killed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import arkv_fx
from arkv_fx.errors import ExportError
from arkv_fx.exporting import output
from arkv_fx.exporting.output import appearing
from arkv_fx.models import random_model


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with appearing(folder) as work:
        (work / "x").write_text("x")
        assert not folder.exists()
    assert [p.name for p in folder.iterdir()] == ["x"]
    assert [p.name for p in folder.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_of_a_run_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), appearing(tmp_path / "a" / "b") as work:
        (work / "x").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_killed_run_is_cleaned_up_by_the_next_but_a_running_one_is_not(tmp_path: Path) -> None:
    script = f"""
        from pathlib import Path
        from arkv_fx.exporting.output import appearing
        with appearing(Path({str(tmp_path / "e")!r})) as work:
            (work / "x").write_text("x")
            print("begun", flush=True)
            input()
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None and run.stdout.readline() == "begun\n"
    (left,) = tmp_path.iterdir()
    with pytest.raises(ValueError), appearing(tmp_path / "e"):
        assert left.exists(), "another run was still writing"
        raise ValueError
    run.kill()
    run.wait()
    assert left.exists()
    with appearing(tmp_path / "e"):
        assert not left.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(*args: Any) -> None:
        pytest.fail("captured")

    monkeypatch.setattr("arkv_fx.exporting.make_programs", captured)
    (tmp_path / "file").write_text("a file")
    model = random_model("llama", num_hidden_layers=1)
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ExportError, match="file"):
            arkv_fx.export(model, None, place)
    monkeypatch.setattr(output.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(ExportError, match="nothing can be written there"):
        arkv_fx.export(model, None, tmp_path / "e")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "llama"}, "model is a str: give a torch.nn.Module"),
        ({"calibration": {"layers": []}}, "calibration is a dict: give what arkv_fx.calibrate"),
        ({"out_dir": None}, "out_dir is a NoneType: give the path of a folder"),
        ({"config": {"budget": 64}}, "config is a dict: give an ArkvConfig, or None"),
        ({"batch": 1.5}, "batch=1.5: must be a whole number"),
        ({"batch": True}, "batch=True: must be a whole number"),
    ],
)
def test_arguments_of_wrong_types_are_named(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = random_model("llama", num_hidden_layers=1)
    given = {"model": model, "calibration": None, "out_dir": tmp_path / "e", **change}
    with pytest.raises(ExportError, match=says):
        arkv_fx.export(**given)
    assert not list(tmp_path.iterdir())
