"""The examples in the docstrings of the public names run, and show what they say."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from types import ModuleType

import pytest

import arkv_fx

NAMES = [n for n in arkv_fx.__all__ if not isinstance(getattr(arkv_fx, n), ModuleType)]


@pytest.fixture
def runner() -> Iterator[doctest.DocTestRunner]:
    yield doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)


def examples(name: str, of: object) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(of, name, globs={}) if test.examples]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str, runner: doctest.DocTestRunner) -> None:
    found = examples(name, getattr(arkv_fx, name))
    assert found, f"arkv_fx.{name} has no example"
    for test in found:
        said: list[str] = []
        assert runner.run(test, out=said.append).failed == 0, "".join(said)


def test_a_wrong_example_is_noticed(runner: doctest.DocTestRunner) -> None:
    """Negative control."""

    def wrong() -> None:
        """Adds.

        >>> 1 + 1
        3
        """

    (test,) = examples("wrong", wrong)
    assert runner.run(test, out=lambda text: None).failed == 1
