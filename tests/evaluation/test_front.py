"""The Pareto front, against its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkv_fx.evaluation.pages.front import front

POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=20)


def by_definition(points: list[tuple[int, int]], higher: bool) -> set[int]:
    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        no_worse = a[1] >= b[1] if higher else a[1] <= b[1]
        return a[0] <= b[0] and no_worse and a != b

    return {i for i, p in enumerate(points) if not any(beats(q, p) for q in points)}


@given(POINTS, st.booleans())
def test_it_is_who_nobody_beats(points: list[tuple[int, int]], higher: bool) -> None:
    found = front(points, higher=higher)
    assert set(found) == by_definition(points, higher)
    assert len(set(found)) == len(found)
    sizes = [points[i][0] for i in found]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("higher", [True, False])
def test_points_that_are_alike_are_on_it_together(higher: bool) -> None:
    assert front([(2, 0.5), (1, 0.5), (1, 0.5)], higher=higher) == [1, 2]
