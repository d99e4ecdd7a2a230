"""Random models, configurations and ways of using a cache, against what they must equal.

Some cases here, ``MANY`` when slow; ``python tests/fuzz/fuzz_run.py SEED`` plays the one that a
failure names. ``ARKV_FUZZ_FROM=SEED`` moves the slow ones to others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from fuzz_cases import LONGEST, SCRIPTS, case
from fuzz_run import Mismatch, Subject

from arkv_fx.kernels import softmax
from arkv_fx.ops import attend, exchange

MANY = 75 * SCRIPTS
FROM = int(os.environ.get("ARKV_FUZZ_FROM", "0")) // SCRIPTS
STABLE = 0.8  # share of a group's cases, at least, that must not hang on rounding

subject = lru_cache(maxsize=1)(Subject)  # a group's tests follow each other


@pytest.fixture(autouse=True, scope="module")
def nothing_stays() -> Iterator[None]:
    yield
    subject.cache_clear()
    torch._dynamo.reset()


def seeds(number: int) -> range:
    return range(number * SCRIPTS, (number + 1) * SCRIPTS)


def play(number: int) -> None:
    """All cases of a group."""
    models = subject(number)
    for seed in seeds(number):
        models.check(case(seed))
    unstable = models.unstable
    assert len(unstable) <= (1 - STABLE) * SCRIPTS, f"{unstable} hang on rounding: too many"


def _later_mask(mask: Any, pos: Any, *args: Any, original: Callable[..., Any]) -> Any:
    """A slot is hidden where its neighbour should be."""
    return original(mask, pos + 1, *args)


def _all_real(mask: Any, *args: Any, original: Callable[..., Any]) -> Any:
    """Padding is stored."""
    return original(None, *args)


def _not_stored(*args: Any, original: Callable[..., Any]) -> Any:
    """A decoded token finds no place."""
    moves = original(*args)
    moves[0].wins = torch.zeros_like(moves[0].wins)
    return moves


def _late_position(*args: Any, original: Callable[..., Any]) -> Any:
    """New tokens are kept under the next one's position."""
    new, query_pos = original(*args)
    new.pos = torch.where(new.pos < 0, new.pos, new.pos + 1)
    return new, query_pos


Fault = tuple[Any, str, Callable[..., Any]]
QUICK: dict[int, tuple[Fault, ...]] = {
    0: ((softmax, "gather_mask", _later_mask), (attend, "_arrivals", _late_position)),
    9: ((exchange, "_choose_moves", _not_stored),),
    44: ((attend, "_valid", _all_real),),
}
"""Groups of each kind but the last, cheap to trace, with faults that their cases must find."""


@pytest.mark.parametrize(
    ("number", "fault"),
    [(number, fault) for number, faults in QUICK.items() for fault in (None, *faults)],
    ids=lambda value: value[2].__name__ if isinstance(value, tuple) else value,
)
def test_some_cases(number: int, fault: Fault | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hold as it is; with a fault planted one soon does not, and says which."""
    if fault is None:
        return play(number)
    module, name, wrong = fault
    subject(number).check(case(seeds(number)[0]))
    monkeypatch.setattr(module, name, partial(wrong, original=getattr(module, name)))
    with pytest.raises(Mismatch, match=r"(?s)seed (\d+).*fuzz_run.py \1"):
        for seed in seeds(number):
            subject(number).check(case(seed))
    return None


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FROM, FROM + MANY // SCRIPTS))
def test_many_cases(number: int) -> None:
    play(number)


def test_a_case_is_its_seed() -> None:
    cases = [case(seed) for seed in range(0, 4000, 7)]
    assert cases == [case(seed) for seed in range(0, 4000, 7)]
    assert len({str(c.turns) for c in cases}) > 300
    assert {c.group.kind for c in cases} == {"identity", "alone", "lowered"}
    assert max(sum(t.size + t.ahead for t in c.turns) for c in cases) <= LONGEST
