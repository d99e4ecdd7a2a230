"""Files that are there whole, or not at all, whenever a process is stopped."""

from __future__ import annotations

import glob
import os
import shutil
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

STALE_S = 60
"""Nobody takes so long to write a text: a part that is older was left by a process that died."""


def cache_folder() -> Path:
    """Where things are kept for the next process: ``ARKV_CACHE``, else among the user's caches."""
    if own := os.environ.get("ARKV_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arkv_fx"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file by way of one beside it, which takes its place when it is complete.

    Raises:
        OSError: if it cannot be written; what was there before is there still.
    """
    target = Path(path).resolve()  # of a link, what it leads to
    if target.exists() and not target.is_file():  # a terminal, a pipe
        target.write_text(text, encoding="utf-8")
        return
    with instead_of(target) as partial:
        partial.write_text(text, encoding="utf-8")


def obstacle_to_folder(folder: Path) -> str:
    """Why a folder cannot be made, or is not there and empty; nothing if it can or is.

    Raises:
        OSError: if it cannot be looked at.
    """
    if folder.exists():
        good = folder.is_dir() and not any(folder.iterdir())
        return "" if good else f"{folder} exists and is not an empty folder"
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return f"{folder}: cannot be made: {there} is no folder, or not to be written"
    return ""


@contextmanager
def instead_of(path: str | os.PathLike[str]) -> Generator[Path]:
    """A path beside a file; what is written there takes the file's place at the end.

    Raises:
        OSError: if it cannot; what was there before is there still.
    """
    target = Path(path).resolve()
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        if time.time() - left.stat().st_mtime > STALE_S:
            left.unlink(missing_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
