"""Logging under the name "arkv_fx": silent, unless the program or the environment asks for it.

``ARKV_LOG=info`` in the environment writes one line per graph to stderr, ``ARKV_LOG=debug`` the
graphs, too. A program that sets up ``logging`` itself needs neither.
"""

from __future__ import annotations

import logging
import os

from arkv_fx.errors import UnknownOptionError

LEVELS = {"info": logging.INFO, "debug": logging.DEBUG}


def get_logger(name: str) -> logging.Logger:
    """The logger "arkv_fx.<name>"."""
    return logging.getLogger(f"arkv_fx.{name}")


def _set_up(level: str) -> None:
    """Write to stderr from that level on, or nowhere for "".

    Raises:
        UnknownOptionError: for a level that does not exist.
    """
    root = logging.getLogger("arkv_fx")
    if not level:
        root.addHandler(logging.NullHandler())
        return
    if level not in LEVELS:
        raise UnknownOptionError(f"ARKV_LOG={level!r}: choose one of {list(LEVELS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(LEVELS[level])
    root.propagate = False  # else a program with handlers of its own would show each line twice


_set_up(os.environ.get("ARKV_LOG", "").strip().lower())
