"""How a budget is shared out among layers, from what each layer loses under each option."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHARES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Budgets that a layer may have, in units of the configured one: few, so that layers share shapes.
"""

KINDS = 8
"""Layers have no more shapes than this."""


@dataclass(frozen=True)
class Option:
    """What one layer may be given: a share of the configured budget and an OQ ratio."""

    share: float
    oq_ratio: float


Costs = dict[int, dict[Option, float]]
"""What each layer loses under each option, in a unit that adds up over layers."""

Tried = Sequence[tuple[float, float, float]]
"""(size, OQ ratio, cost) of one layer; sizes as fractions of its full cache."""


def allocate(costs: Costs) -> dict[int, Option]:
    """One option a layer, of the least summed cost within a mean share of one.

    The multiple-choice knapsack, exactly: for each sum of shares the cheapest way to it, layer by
    layer. Where nothing is cheap enough (a layer's least share is above one) the least shares are.
    """
    layers = list(costs)
    least = {layer: min(o.share for o in of) for layer, of in costs.items()}
    budget = max(len(layers), sum(least.values())) + 1e-9
    reached: dict[float, tuple[float, tuple[Option, ...]]] = {0.0: (0.0, ())}
    for done, layer in enumerate(layers):
        rest = sum(least[later] for later in layers[done + 1 :])
        best: dict[float, Option] = {}
        for option, cost in costs[layer].items():
            if option.share not in best or cost < costs[layer][best[option.share]]:
                best[option.share] = option
        after: dict[float, tuple[float, tuple[Option, ...]]] = {}
        for spent, (lost, chosen) in reached.items():
            for share, option in best.items():
                total, cost = round(spent + share, 6), lost + costs[layer][option]
                if total + rest <= budget and cost < after.get(total, (math.inf, ()))[0]:
                    after[total] = cost, (*chosen, option)
        reached = after
    # Of equal costs the most bytes: those that were asked for, also where nothing tells what for.
    _, _, chosen = min((cost, -spent, of) for spent, (cost, of) in reached.items())
    return dict(zip(layers, chosen, strict=True))


def allocate_few(costs: Costs, most: int = KINDS) -> dict[int, Option]:
    """``allocate`` among ``most`` options at most: layers of one shape are compiled once.

    Those that most layers would take, and the smallest of all, so that the rest can have theirs.
    """
    chosen = allocate(costs)
    taken = Counter(chosen.values())
    if len(taken) <= most:
        return chosen
    least = min(taken, key=lambda option: (option.share, -taken[option]))
    kept = {least, *(option for option, _ in taken.most_common(most - 1))}
    few = {
        layer: {option: cost for option, cost in of.items() if option in kept} or of
        for layer, of in costs.items()
    }
    return allocate(few)


def options(tried: Tried, size: float) -> dict[Option, float]:
    """What a layer would lose under each share of a budget of ``size``.

    Between two sizes that were tried with one OQ ratio a cost is interpolated, as a power of the
    size; below all of them it goes on like that, above it stays. A ratio that was tried at the
    smaller of two sizes only (it wastes bytes at the larger) costs what it costs there.
    """
    known = {(round(s, 9), ratio): cost for s, ratio, cost in tried}
    sizes = sorted({s for s, _ in known})
    ratios = sorted({ratio for _, ratio in known})
    found: dict[Option, float] = {}
    for index, share in enumerate(SHARES):
        if index and size * SHARES[index - 1] >= sizes[-1]:
            break  # the last one holds every token in full quality already
        at = min(round(size * share, 9), sizes[-1])
        place = bisect_left(sizes, at)
        exact = sizes[place] == at or len(sizes) == 1
        low, high = sizes[max(0, place - 1)], sizes[max(place, min(1, len(sizes) - 1))]
        for ratio in ratios:
            if exact:
                cost = known.get((sizes[place], ratio))
            elif (low, ratio) in known and (high, ratio) in known:
                cost = _power(low, known[low, ratio], high, known[high, ratio], at)
            else:
                cost = known.get((low, ratio))
            if cost is not None:
                found[Option(share, ratio)] = cost
    return found


def _power(low: float, a: float, high: float, b: float, at: float) -> float:
    """The power law through (low, a) and (high, b) at a size."""
    tiny = 1e-12  # a cost of nothing has no logarithm
    slope = math.log((b + tiny) / (a + tiny)) / math.log(high / low)
    return max(0.0, math.exp(math.log(b + tiny) + slope * math.log(at / high)) - tiny)


def mean(samples: Sequence[Mapping[int, Mapping[Option, float]]]) -> Costs:
    """Costs averaged over prompts, of the options that all of them have."""
    return {
        layer: {
            option: sum(s[layer][option] for s in samples) / len(samples)
            for option in of
            if all(option in s[layer] for s in samples)
        }
        for layer, of in samples[0].items()
    }
