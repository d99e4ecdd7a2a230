"""Files are there whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arkv_fx.files import STALE_S, write_text

KILLED = """
import os, sys
from pathlib import Path
from arkv_fx.files import write_text
Path.replace = lambda *_: os.kill(os.getpid(), 9)
write_text(sys.argv[1], "new" * 1000)
"""


def test_a_text_is_written_and_replaced(tmp_path: Path) -> None:
    path, link = tmp_path / "a[1].json", tmp_path / "link.json"
    write_text(path, "ä")
    path.chmod(0o640)
    link.symlink_to(path)
    write_text(link, "other")
    assert path.read_text(encoding="utf-8") == "other" and link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 2
    write_text("/dev/null", "no file at all")
    assert Path("/dev/null").is_char_device()


def test_who_is_killed_leaves_the_old_file_and_nothing_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_text(path, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9 and path.read_text() == "old"
    (left,) = (p for p in tmp_path.iterdir() if p != path)
    write_text(path, "young parts may be another process's")
    assert left.exists()
    before = time.time() - STALE_S - 1
    os.utime(left, (before, before))
    write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"] and path.read_text() == "new"


def test_what_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
