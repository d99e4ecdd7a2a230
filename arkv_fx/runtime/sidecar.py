"""Reading ``arkv.json``."""

from __future__ import annotations

FILE = "arkv.json"
VERSION = 1
METADATA = "arkv"
"""The key under which a graph's file carries the same."""
OPSET = 21
