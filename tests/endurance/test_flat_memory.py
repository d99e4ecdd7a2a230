"""Memory stays what it is, however long a process decodes and however many prompts it answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("flat_memory.py")
TOLERANCE = 6 * 1024  # KiB from the first tenth to the last: 0.7 KiB a step, 35 a call


def growth(*arguments: str) -> dict[str, int]:
    """KiB of resident memory that steps and calls took, once warm."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    taken: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        what, _, kib = line.split()
        taken.setdefault(what, []).append(int(kib))
    print(taken)
    return {what: sizes[-1] - sizes[0] for what, sizes in taken.items()}


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_memory_is_flat(lowering: str) -> None:
    grown = growth(lowering, "10000", "200")
    assert grown.keys() == {"steps", "calls"}
    assert max(grown.values()) <= TOLERANCE, grown


@pytest.mark.slow
def test_a_leak_is_noticed() -> None:
    """Negative control: four KiB a step that nobody frees."""
    grown = growth("eager", "3000", "10", "leak")
    assert grown["steps"] > TOLERANCE
