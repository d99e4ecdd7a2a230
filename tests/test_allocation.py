"""Sharing a budget out: the best there is, and what a layer loses between what was tried."""

from __future__ import annotations

import itertools
import random

import pytest

from arkv_fx.allocation import KINDS, SHARES, Costs, Option, allocate, allocate_few, options


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_the_best_there_is(seed: int) -> None:
    """Whether or not gains diminish, where a greedy choice would go wrong."""
    chance = random.Random(seed)
    places = [Option(share, ratio) for share in SHARES[::2] for ratio in (0.1, 0.7)]
    costs: Costs = {layer: {place: chance.random() for place in places} for layer in range(4)}
    every = itertools.product(places, repeat=len(costs))
    best = min(
        sum(costs[layer][place] for layer, place in enumerate(chosen))
        for chosen in every
        if sum(place.share for place in chosen) <= len(costs)
    )
    chosen = allocate(costs)
    assert sum(place.share for place in chosen.values()) <= len(costs)
    assert sum(costs[layer][place] for layer, place in chosen.items()) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_few_options_are_few_and_keep_the_budget(seed: int) -> None:
    chance = random.Random(seed)
    ratios = (0.0, 0.1, 0.2, 0.4)
    costs: Costs = {}
    for layer in range(30):
        scale, best = 10 ** chance.uniform(-3, 0), chance.choice(ratios)
        costs[layer] = {
            Option(share, ratio): scale * share**-2 * (1 + abs(ratio - best))
            for share in SHARES
            for ratio in ratios
        }
    free, few = allocate(costs), allocate_few(costs)
    assert len(set(few.values())) <= KINDS < len(set(free.values()))
    assert sum(option.share for option in few.values()) <= len(costs)

    def lost(chosen: dict[int, Option]) -> float:
        return sum(costs[layer][option] for layer, option in chosen.items())

    assert lost(free) <= lost(few) <= 1.25 * lost(free)


def test_bytes_that_help_nobody_are_left() -> None:
    costs = {0: {Option(s, 0.1): 0.0 for s in SHARES}, 1: {Option(s, 0.1): 1 / s for s in SHARES}}
    chosen = allocate(costs)
    assert (chosen[0].share, chosen[1].share) == (0.5, 1.5)


TRIED = [(0.125, 0.0, 0.08), (0.25, 0.0, 0.02), (0.25, 0.7, 0.01), (0.5, 1.0, 0.001)]


def test_what_was_tried_costs_what_it_cost() -> None:
    found = options(TRIED, 0.25)
    assert found[Option(0.5, 0.0)] == 0.08
    assert (found[Option(1.0, 0.0)], found[Option(1.0, 0.7)]) == (0.02, 0.01)
    assert found[Option(2.0, 1.0)] == 0.001
    assert Option(0.5, 0.7) not in found and Option(2.0, 0.0) not in found


def test_between_two_sizes_a_cost_is_a_power_of_the_size() -> None:
    found = options(TRIED, 0.25)
    assert found[Option(0.75, 0.0)] == pytest.approx(0.08 * 1.5**-2)
    assert found[Option(1.5, 0.7)] == 0.01, "it was not tried at the larger size"
    assert Option(1.5, 1.0) not in found, "it was not tried at the smaller size"


def test_beyond_all_sizes() -> None:
    assert options(TRIED, 0.0625)[Option(0.5, 0.0)] == pytest.approx(0.08 * 16, rel=1e-6)
    # The least share holds every token in full quality: more would buy nothing.
    assert options(TRIED, 1.0) == {Option(0.5, 1.0): 0.001}
    assert options(TRIED[:1], 0.01) == {Option(share, 0.0): 0.08 for share in SHARES}
