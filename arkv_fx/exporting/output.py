"""A folder that appears when everything in it is written: until then it is a hidden sibling."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from arkv_fx.errors import ExportError
from arkv_fx.files import obstacle_to_folder

LOCK = ".writing"
"""A file in the sibling, locked by whoever writes: a killed process leaves it unlocked."""


@contextmanager
def appearing(folder: Path) -> Generator[Path]:
    """Within it what is written into the given folder becomes ``folder`` at the end.

    Nothing stays if the end is not reached; what a killed run left is cleaned up by the next.

    Raises:
        ExportError: if the folder is not empty, or cannot be made; before anything is done.
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()][1:]
    try:
        if reason := obstacle_to_folder(folder):
            raise ExportError(reason)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        work = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
        lock = os.open(work / LOCK, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ExportError(f"{folder}: nothing can be written there: {error}") from error
    try:
        _lock(lock)
        yield work
        (work / LOCK).unlink()
        work.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    finally:
        os.close(lock)
        shutil.rmtree(work, ignore_errors=True)
        for parent in missing:  # stays where it is not empty
            with suppress(OSError):
                parent.rmdir()


def _prefix(folder: Path) -> str:
    return f".{folder.name}.writing-"


def _clean(folder: Path) -> None:
    """Remove what killed runs left."""
    for left in folder.parent.glob(f"{_prefix(folder)}*"):
        try:
            lock = os.open(left / LOCK, os.O_RDWR)
        except OSError:
            continue  # just made
        try:
            if _lock(lock):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(file: int) -> bool:
    """Whether the file was free and is now ours, until it is closed."""
    try:
        import fcntl
    except ImportError:  # on Windows nothing is cleaned up
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
