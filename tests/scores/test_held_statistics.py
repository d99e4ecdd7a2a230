"""Masses in half precision and novelty in a byte: what is lost; ranks are of what is held."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arkv_fx.scores import Observation, mass
from arkv_fx.scores.combined import LEAST, CombinedScore
from arkv_fx.scores.half import LARGEST, to_half
from arkv_fx.scores.mass import UNIT, MassScore
from arkv_fx.scores.novelty import NoveltyScore

COLUMNS = 64


def observation(probs: Tensor) -> Observation:
    """One query's probabilities [N] of columns that are long there."""
    n = len(probs)
    return Observation(
        probs=probs.view(1, 1, 1, 1, n), real=torch.ones(1, 1, dtype=torch.bool),
        query_pos=torch.tensor([[n]]), pos=torch.arange(n).expand(1, 1, -1),
        steps=torch.ones(1, 1, n), window=1, padded=False,
    )  # fmt: skip


def moved(score: MassScore, seen: Tensor) -> Tensor:
    """Masses [N] after the observations [steps, N], as they are held, from zeros."""
    held = torch.zeros(1, 1, seen.shape[1], dtype=score.slot_fields[0].dtype)
    for probs in seen:
        held = score.observe({"mass": held}, observation(probs))["mass"]
    return held[0, 0]


def average(decay: float, seen: Tensor) -> Tensor:
    """The same in double precision."""
    held = torch.zeros(seen.shape[1], dtype=torch.float64)
    for probs in seen.double():
        held = decay * held + (1 - decay) * probs
    return held


def stated(decay: float, size: Tensor) -> Tensor:
    """The error that the docstring states, of masses no larger than ``size``, and float32's own."""
    return (2.0**-11 * size + 2.0**-33) / (1 - decay) + 1e-6 * size


# Rounding


def test_halves_are_those_of_a_cast() -> None:
    """All exponents, ties and subnormals among them; what is too large is the largest."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F800000, (200_000,), generator=generator, dtype=torch.int32)
    ties = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    x = torch.cat([bits.view(torch.float32), ties, (ties[1:] + ties[:-1]) / 2])
    assert torch.equal(to_half(x), x.clamp(max=LARGEST).to(torch.float16))
    assert to_half(torch.tensor([1e30, torch.inf])).tolist() == [LARGEST, LARGEST]
    assert to_half(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("rounded", [True, False], ids=["rounded", "only cast"])
def test_compiled_ranks_are_of_what_is_held(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor drops a cast to float16 and back; the second is the negative control."""
    if not rounded:
        monkeypatch.setattr(mass, "to_half", lambda x: x.clamp(max=LARGEST).to(torch.float16))
    torch._dynamo.reset()
    score = MassScore(age=0)

    def step(probs: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        stats = score.observe({"mass": held}, observation(probs))
        return stats["mass"], score.precision(stats, probs, probs)

    generator = torch.Generator().manual_seed(0)
    held = torch.rand(1, 1, 1000, generator=generator).half()
    found, rank = torch.compile(step)(torch.rand(1000, generator=generator), held)
    assert found.dtype == torch.float16
    assert torch.equal(found.float(), rank) == rounded


# Mass


@given(
    decay=st.sampled_from((0.0, 0.5, 0.9, 0.97, 0.99)),
    probs=st.lists(st.floats(2.0**-40, 8.0, width=32), min_size=1, max_size=8),
)
def test_a_mass_settles_on_what_it_sees(decay: float, probs: list[float]) -> None:
    """Observed again and again, within 5 % at 0.99."""
    wanted = torch.tensor(probs)
    steps = 1 + int(12 / (1 - decay))
    found = moved(MassScore(decay), wanted.expand(steps, -1)).double() * UNIT
    rest = decay**steps * wanted.double()  # of the average itself
    assert ((found - wanted.double()).abs() <= stated(decay, wanted.double()) + rest).all()


@given(decay=st.sampled_from((0.5, 0.9, 0.99)), seed=st.integers(0, 999), heads=st.integers(1, 255))
def test_a_mass_is_near_the_average_in_double_precision(
    decay: float, seed: int, heads: int
) -> None:
    """Attention of all sizes, that comes and goes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = heads * 10.0 ** (-12 * torch.rand(COLUMNS, generator=generator))
    seen = sizes * (torch.rand(300, COLUMNS, generator=generator) < 0.5)
    found = moved(MassScore(decay), seen).double() * UNIT
    assert ((found - average(decay, seen)).abs() <= stated(decay, sizes.double())).all()


def test_the_stated_error_is_no_larger_than_it_must_be() -> None:
    """A mass that comes from below stays within, and not far from, 5 % below what it sees."""
    found = float(moved(MassScore(), torch.full((4000, 1), 0.0402))) * UNIT
    assert 0.03 < 1 - found / 0.0402 < 0.05


def test_slow_averages_are_held_in_full_precision() -> None:
    seen = torch.rand(3000, COLUMNS, generator=torch.Generator().manual_seed(0))
    for build in (MassScore, CombinedScore):
        dtypes = [build(decay).slot_fields[0].dtype for decay in (0.5, 0.99, 0.991)]
        assert dtypes == [torch.float16, torch.float16, torch.float32]
    found = moved(MassScore(0.999), seen).double() * UNIT
    torch.testing.assert_close(found, average(0.999, seen), rtol=1e-4, atol=0.0)


def test_the_unit_is_nothing_to_ranks() -> None:
    """The same order as of the masses themselves, down to what half precision knows of them."""
    score = CombinedScore()
    masses = 10.0 ** torch.linspace(-8.0, 1.5, 200)
    stats = {"mass": to_half(masses / UNIT)[None, None], "novelty": torch.zeros(1, 1, 200)}
    age, valid = torch.full((1, 1, 200), 999.0), torch.ones(1, 1, 200, dtype=torch.bool)
    rank = score.eviction({**stats, "novelty": stats["novelty"] - 1000.0}, age, valid)
    assert (score.precision(stats, age, valid)[0, 0].diff() > 0).all()
    assert (rank.diff() >= 0).all() and LEAST > 1e-7
    nothing = score.eviction({**stats, "mass": stats["mass"] * 0}, age, valid)
    assert nothing.isfinite().all()


# Novelty


def arrived(keys: Tensor) -> Tensor:
    layer = {"key_sum": torch.zeros(1, 1, keys.shape[-1])}
    valid = torch.ones(1, keys.shape[2], dtype=torch.bool)
    return NoveltyScore(values=0, ahead=0).arrive(keys, keys, valid, layer)["novelty"][0, 0]


def test_novelty_reaches_from_one_end_of_its_byte_to_the_other() -> None:
    keys = torch.tensor([1.0, 0.0, 3.0]).repeat(9, 1)
    keys[4] *= -2
    found = arrived(keys[None, None])
    assert found.dtype == torch.int8 and found.tolist() == [-127] * 4 + [127] + [-127] * 4
    assert arrived(torch.zeros(1, 1, 3, 4)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_novelty_of_what_is_no_number_is_zero(number: float) -> None:
    keys = torch.ones(1, 1, 4, 8)
    keys[0, 0, 1, 2] = number
    assert arrived(keys).tolist()[1] == 0
