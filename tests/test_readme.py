"""The README's Python runs as it stands, and so do the scripts in examples/."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SLOW = "smollm2"  # in the names of examples that take minutes
EXAMPLES = [
    pytest.param(path, id=path.name, marks=[pytest.mark.slow] if SLOW in path.name else [])
    for path in sorted((ROOT / "examples").glob("*.py"))
]


def test_there_is_something_to_run() -> None:
    assert BLOCKS
    assert EXAMPLES


@pytest.mark.parametrize("block", BLOCKS)
def test_readme_block(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "attention sites fused" in printed or ".report()" not in block
    assert printed


@pytest.mark.parametrize("path", EXAMPLES)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_the_readme_and_ci_run_the_same_tests() -> None:
    command = "python -m pytest -q -n 2"
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci" / "run").read_text()
