"""kill -9 at any moment: the next run works, and nothing lies about for ever.

``ARKV_KILLS`` says how often (20), ``ARKV_KILL_SEED`` at which moments.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed_work import TASKS

SCRIPT = Path(__file__).with_name("killed_work.py")
KILLS = int(os.environ.get("ARKV_KILLS", "20"))
SEED = os.environ.get("ARKV_KILL_SEED", "0")


def start(task: str, folder: Path) -> subprocess.Popen[str]:
    """The work begun, in a process group of its own, with every cache in the folder."""
    places = {
        "ARKV_CACHE": folder / "cache", "TORCHINDUCTOR_CACHE_DIR": folder / "torch" / "inductor",
        "TMPDIR": folder / "torch",
    }  # fmt: skip
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), task, str(folder)],
        env={**os.environ, **{name: str(place) for name, place in places.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline() != "begin\n":
        raise AssertionError(f"{task} did not begin: {process.communicate()[1][-3000:]}")
    return process


def finish(task: str, folder: Path) -> tuple[str, float]:
    """A run that nobody kills: its answer, and how many seconds it took."""
    process, began = start(task, folder), time.monotonic()
    said, errors = process.communicate()
    assert process.returncode == 0, f"{task}: {errors[-3000:]}"
    return said, time.monotonic() - began


def kill(task: str, folder: Path, moment: float) -> None:
    """A run that is killed, ``moment`` seconds after it began, with all of its children."""
    process = start(task, folder)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def left(folder: Path) -> set[str]:
    """All files but torch's own temporary ones and empty locks."""
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in files if not name.startswith("torch/") and not name.endswith(".lock")}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_killed_and_run_again(task: str, tmp_path: Path) -> None:
    clean, folder = tmp_path / "clean", tmp_path / "killed"
    answer, seconds = finish(task, clean)
    chance = random.Random(f"{SEED} {task}")
    moments = [chance.uniform(0, seconds) for _ in range(KILLS)]
    for moment in moments:
        kill(task, folder, moment)
    shown = f"killed after {', '.join(f'{m:.2f}' for m in moments)} s (ARKV_KILL_SEED={SEED})"
    assert finish(task, folder)[0] == answer, shown
    assert left(folder) == left(clean), f"left behind: {left(folder) - left(clean)}, {shown}"
