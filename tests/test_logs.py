"""The package's own logger: silent by default, and its levels by name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = """
import logging
from arkv_fx.logs import get_logger
own = logging.getLogger("arkv_fx")
get_logger("passes").info("an info")
get_logger("passes").debug("a debug")
print([type(handler).__name__ for handler in own.handlers], "torch" in __import__("sys").modules)
"""


def run(level: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "ARKV_LOG"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if level is not None:
        environment["ARKV_LOG"] = level
    return subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("level", "handler", "written"),
    [
        (None, "NullHandler", ""),
        ("", "NullHandler", ""),
        ("info", "StreamHandler", "arkv_fx.passes: an info\n"),
        ("debug", "StreamHandler", "arkv_fx.passes: an info\narkv_fx.passes: a debug\n"),
    ],
)
def test_what_is_asked_for_is_written(level: str | None, handler: str, written: str) -> None:
    done = run(level)
    assert (done.stdout, done.stderr) == (f"['{handler}'] False\n", written)


def test_an_unknown_level_is_refused_by_name() -> None:
    done = run("loud")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("UnknownOptionError: ARKV_LOG='loud': choose one of ['info', 'debug']")
