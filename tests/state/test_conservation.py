"""Where tokens are: never twice, never back, never encoded again, never dropped with room left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference_attention import Layer, make_mask
from torch import Tensor

import arkv_fx.ops.attend as attend_module
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops import arrivals, exchange, merge
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.scores import SCORES

RING = 0  # levels: 0 the ring, 1 and 2 the tiers
EVICTED = 9
KNOBS = Knobs(0.35)
DIM = 8


@dataclass(frozen=True)
class Held:
    """One token as it lies in its slot."""

    level: int
    codes: tuple[Tensor, ...]
    stats: dict[str, float]


Where = list[list[dict[int, Held]]]  # [sequence][head][position]


def where(layer: Layer) -> Where:
    """All tokens held, by position. A position held twice fails here."""
    out: Where = [[{} for _ in range(layer.plan.heads)] for _ in range(layer.batch)]
    for level, segment in enumerate(layer.state.view().segments):
        for b, h, slot in (segment.pos >= 0).nonzero().tolist():
            pos = int(segment.pos[b, h, slot])
            assert pos not in out[b][h], f"position {pos} is held twice"
            codes = tuple(f[b, h, slot].clone() for f in (*segment.k, *segment.v))
            stats = {n: float(t[b, h, slot]) for n, t in segment.stats.items()}
            out[b][h][pos] = Held(level, codes, stats)
    return out


def first_useful(layer: Layer) -> int:
    """The first position that the next query can see: older ones may be kept or not."""
    return layer.seen + 1 - layer.plan.sliding if layer.plan.sliding else 0


def check(layer: Layer, before: Where, evicted: list[list[set[int]]]) -> None:
    """All that holds after a step, given what was held before it; updates `evicted`."""
    plan, view, now = layer.plan, layer.state.view(), where(layer)
    assert torch.equal(view.count, layer.valid.sum(-1).int()), "count is wrong"
    assert (view.seen == layer.seen).all(), "seen is wrong"
    assert not view.bad.any()
    first = first_useful(layer)
    for b in range(layer.batch):
        real = layer.valid[b].nonzero().flatten().tolist()
        kept = set(real[: plan.sinks]) | set(real[plan.sinks :][-plan.window :])
        for h in range(plan.heads):
            held, old = now[b][h], before[b][h]
            assert {p for p, x in held.items() if x.level == RING} == kept, "ring is wrong"
            assert set(held) <= set(real), "padding is held"
            assert not set(held) & evicted[b][h], "an evicted token returned"
            for pos, token in held.items():
                _check_token(layer, b, h, pos, token, old.get(pos))
            gone = set(real) - set(held)
            # Every token that anyone can still attend to is kept while there is room.
            useful = {p for p in gone - evicted[b][h] if p >= first}
            room = sum(t.slots for t in plan.tiers)
            room -= sum(x.level != RING and p >= first for p, x in held.items())
            assert not (useful and room), f"{useful} dropped with {room} slots free"
            evicted[b][h] |= gone
            assert len(held) + len(evicted[b][h]) == len(real)


def _check_token(layer: Layer, b: int, h: int, pos: int, token: Held, old: Held | None) -> None:
    plan = layer.plan
    if old is not None:
        assert token.level >= old.level, f"{pos} went up from {old.level} to {token.level}"
        if token.level == old.level:
            same = all(torch.equal(*pair) for pair in zip(token.codes, old.codes, strict=True))
            assert same, f"{pos} was encoded again"
        # What leaves the ring takes its neighbours into account: tests/scores/test_novelty.py.
        settled = {"norm"} if old.level == RING != token.level else {"novelty", "norm"}
        for name in settled & set(token.stats):
            assert token.stats[name] == old.stats[name], f"{pos} has another token's {name}"
    fmt = plan.segments()[token.level][0]
    split = len(fmt.key.fields(plan.k_dim, plan.dtype))
    parts = (fmt.key, token.codes[:split], layer.k), (fmt.value, token.codes[split:], layer.v)
    for codec, codes, history in parts:
        original = history[b, h, pos].float()
        stored = codec.from_stored(codec.decode(codes, original.shape[-1], torch.float32))
        size = original.norm()
        if history is layer.k and codec.centred and token.level != RING:
            centre = layer.state.view().centre[b, h]
            stored, size = stored + centre, (original - centre).norm()
        # In the ring, a float32 model's tokens may be held in bfloat16, and leave it so.
        rounded = original.bfloat16().float() if plan.window_format == "bf16" else original
        if fmt.name == "native" and token.level != RING:
            exact = torch.equal(stored, original) or torch.equal(stored, rounded)
            assert exact, f"{pos} is not exact in level {token.level}"
        elif fmt.name in ("native", "bf16"):
            assert torch.equal(stored, rounded), f"{pos} is not exact in the ring"
        else:  # its own numbers, not a neighbour's
            assert (stored - original).norm() < 0.4 * size, f"{pos} is another token"


def step(layer: Layer, valid: Tensor, generator: torch.Generator, fresh: bool = False) -> None:
    """One call with random numbers."""
    batch, length = valid.shape
    dtype, heads = layer.plan.dtype, layer.plan.heads
    q = torch.randn(batch, heads * 2, length, DIM, generator=generator).to(dtype) * 2
    k, v = torch.randn(2, batch, heads, length, DIM, generator=generator).to(dtype)
    mask = make_mask(torch.cat([layer.valid, valid], 1), length, kind="bool",
                     sliding=layer.plan.sliding)  # fmt: skip
    layer.step(q, k, v, mask, KNOBS, valid, fresh)


TIERS = (
    ("int8", "int4"),
    ("native", "fp8"),
    ("k8v4", "k4v3"),
    ("native", "native"),
    ("native",),
    ("int4",),
)


@st.composite
def histories(draw: st.DrawFn, score: str) -> tuple[LayerPlan, list[Tensor], int]:
    """A plan, which tokens of each call are real, and a seed."""
    tiers = draw(st.sampled_from(TIERS))
    sliding = draw(st.sampled_from((0, 0, 0, 5)))
    plan = LayerPlan(
        heads=2, k_dim=DIM, v_dim=DIM,
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        window=draw(st.integers(1, 4)), sinks=0 if sliding else draw(st.integers(0, 2)),
        sliding=sliding,
        tiers=tuple(Tier(name, draw(st.integers(0, 5))) for name in tiers), score=score,
        window_format=draw(st.sampled_from(("native", "native", "bf16"))),
        short_positions=draw(st.booleans()),
    )  # fmt: skip
    batch = draw(st.integers(1, 2))
    lengths = draw(st.lists(st.sampled_from((1, 1, 1, 2, 5, 9)), min_size=1, max_size=9))
    padded = draw(st.booleans())
    seed = draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    chance = 0.7 if padded else 1.0
    valid = [torch.rand(batch, n, generator=generator) < chance for n in lengths]
    return plan, valid, seed


def run(history: tuple[LayerPlan, list[Tensor], int]) -> None:
    """Check the whole history, step by step."""
    plan, calls, seed = history
    layer = Layer(plan, len(calls[0]))
    generator = torch.Generator().manual_seed(seed)
    evicted: list[list[set[int]]] = [[set(), set()] for _ in range(layer.batch)]
    for number, valid in enumerate(calls):
        before = where(layer)
        step(layer, valid, generator, fresh=number == 0 and seed % 2 == 0)
        check(layer, before, evicted)


@pytest.mark.parametrize("score", SCORES)
def test_tokens_are_conserved(score: str) -> None:
    @settings(max_examples=50)
    @given(history=histories(score))
    def conserved(history: tuple[LayerPlan, list[Tensor], int]) -> None:
        run(history)

    conserved()


def untied(*args: Any, original: Any = arrivals.rank_tokens) -> Tensor:
    """Ranks without ties: equal ones (up to the order of sums) are told apart by position."""
    return (original(*args).double() * 1e4).round() / 1e4 + args[1] * 1e-6


def rank_by(patch: pytest.MonkeyPatch, ranks: Callable[..., Tensor]) -> None:
    for form in (exchange, merge):
        patch.setattr(form, "rank_tokens", ranks)


def merge_one(held: Any, new: Any, updated: Any, kernel: str) -> None:
    """The decode step by way of the sorting form."""
    merge.merge_many(held, new, updated, False, kernel)


def compare_forms(history: tuple[LayerPlan, list[Tensor], int]) -> None:
    """After any history, both forms of the decode step leave the same."""
    plan, calls, seed = history
    generator = torch.Generator().manual_seed(seed)
    layer = Layer(plan, len(calls[0]))
    for valid in calls:
        step(layer, valid, generator)
    for _ in range(3):
        other = copy.deepcopy(layer)
        other_generator = torch.Generator()
        other_generator.set_state(generator.get_state())
        valid = torch.rand(layer.batch, 1, generator=torch.Generator().manual_seed(seed)) < 0.8
        with pytest.MonkeyPatch.context() as patch:
            rank_by(patch, untied)
            step(layer, valid, generator)
            patch.setattr(attend_module, "exchange_one", merge_one)
            step(other, valid, other_generator)
        one, many = where(layer), where(other)
        for b in range(layer.batch):
            for h in range(plan.heads):
                useful, others = (
                    {p: x for p, x in held[b][h].items() if p >= first_useful(layer)}
                    for held in (one, many)
                )
                assert useful.keys() == others.keys(), "the forms hold different tokens"
                for pos, token in useful.items():
                    twin = others[pos]
                    assert token.level == twin.level, f"{pos} lies in different tiers"
                    same = all(torch.equal(*x) for x in zip(token.codes, twin.codes, strict=True))
                    assert same, f"{pos} has different codes"
                    assert token.stats == pytest.approx(twin.stats), f"{pos}: statistics"
        names = [s.name for s in plan.specs()]
        by_slot = {"pos", *(f.name for f in plan.policy().slot_fields)}
        for name, a, b_ in zip(names, layer.state.tensors, other.state.tensors, strict=True):
            if "." not in name and name not in by_slot:  # per sequence and head
                assert torch.allclose(a, b_), name


@pytest.mark.parametrize("score", SCORES)
def test_one_token_is_a_chunk_of_one(score: str) -> None:
    @settings(max_examples=25)
    @given(history=histories(score))
    def same(history: tuple[LayerPlan, list[Tensor], int]) -> None:
        compare_forms(history)

    same()


def test_the_weakest_goes_and_one_tier_down_at_a_time() -> None:
    """Masses set by hand: the token that leaves the ring displaces the weakest of each tier."""
    options = (("age", 0), ("decay", 0.9999999))
    tiers = (Tier("native", 3), Tier("int8", 2))
    plan = LayerPlan(1, DIM, DIM, torch.float32, 2, 0, 0, tiers, "mass", options)
    layer, generator = Layer(plan, 1), torch.Generator().manual_seed(0)
    real = torch.ones(1, 1, dtype=torch.bool)
    step(layer, real.expand(1, 7), generator)
    first, second = layer.state.view().tiers
    assert sorted(first.pos.flatten().tolist() + second.pos.flatten().tolist()) == [0, 1, 2, 3, 4]
    ring = layer.state.view().ring

    def decode(leaving: float, strong: list[float], weak: list[float]) -> tuple[set[int], set[int]]:
        first.stats["mass"].copy_(torch.tensor(strong))
        second.stats["mass"].copy_(torch.tensor(weak))
        ring.stats["mass"].fill_(leaving)
        step(layer, real, generator)
        return set(first.pos.flatten().tolist()), set(second.pos.flatten().tolist())

    a, b, c = first.pos.flatten().tolist()
    d, _ = second.pos.flatten().tolist()
    # 5 leaves the ring: it beats b, which beats the other one.
    assert decode(50.0, [90, 40, 80], [30, 20]) == ({a, 5, c}, {d, b})
    # 6 is weaker than all of the first tier and beats d in the second.
    assert decode(25.0, [90, 40, 80], [20, 30]) == ({a, 5, c}, {6, b})
    # 7 is the weakest of all: it is gone.
    assert decode(10.0, [90, 40, 80], [20, 30]) == ({a, 5, c}, {6, b})


@pytest.mark.parametrize("form", ["exchange", "merge"])
def test_a_tie_keeps_the_holder(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressing a token costs precision, so an equal one is not displaced."""
    if form == "merge":
        monkeypatch.setattr(attend_module, "exchange_one", merge_one)
    rank_by(monkeypatch, lambda held, pos, *_: _equal(pos))
    tiers = (Tier("int8", 2), Tier("int4", 2))
    plan = LayerPlan(1, DIM, DIM, torch.float32, 2, 0, 0, tiers, "mass")
    layer, generator = Layer(plan, 1), torch.Generator().manual_seed(0)
    for _ in range(9):
        step(layer, torch.ones(1, 1, dtype=torch.bool), generator)
    levels = {p: x.level for p, x in where(layer)[0][0].items()}
    assert levels == {0: 1, 1: 1, 2: 2, 3: 2, 7: RING, 8: RING}


def _equal(pos: Tensor) -> Tensor:
    return torch.where(pos < 0, float("-inf"), 1.0)


# Negative controls: each breaks one thing, and the checks above must notice.


def _twice(held: Any, new: Any, updated: Any, original: Any) -> Any:
    before = held.tiers[0].pos.clone()
    moves = original(held, new, updated)
    held.tiers[0].pos.copy_(before)
    return moves


def _ignores_wins(held: Any, k: Tensor, v: Tensor, moves: Any, writer: Any, original: Any) -> None:
    original(held, k, v, [replace(m, wins=torch.ones_like(m.wins)) for m in moves], writer)


def _nothing_leaves(ring: Any, replaced: Tensor, stats: Any, original: Any) -> Any:
    return original(ring, torch.zeros_like(replaced), stats)


def _shifted(x: Tensor, index: Tensor, original: Any) -> Tensor:
    return original(x, index.roll(1, -1) if x.dim() == 4 else index)


def _renewed(segment: Any, *args: Any) -> Any:
    for codec, fields in segment.parts():  # what the published code does: decode, encode
        for f, x in zip(
            fields, codec.encode(codec.decode(fields, DIM, torch.float32)), strict=True
        ):
            f.copy_(x)
    return args[-1](segment, *args[:-1])


BROKEN = {
    "a demoted token also stays": (exchange, "_choose_moves", _twice, "held twice"),
    "padding is stored": (exchange, "_move_tokens", _ignores_wins, "encoded again|not exact"),
    "what leaves the ring is lost": (merge, "_leavers", _nothing_leaves, "dropped with"),
    "codes are mixed up": (merge, "gather", _shifted, "another token|encoded again|not exact"),
    "codes are renewed": (merge, "_store", _renewed, "encoded again|another token|not exact"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_update_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, attribute, replacement, message = BROKEN[name]
    tiers = (Tier("int8", 4), Tier("int4", 3))
    plan = LayerPlan(2, DIM, DIM, torch.float32, 3, 1, 0, tiers, "mass")
    generator = torch.Generator().manual_seed(5)
    calls = [torch.rand(2, n, generator=generator) < 0.8 for n in (6, 3, 9, *[1] * 12, 6, 1, 1)]
    run((plan, calls, 1))
    original = getattr(form, attribute)
    monkeypatch.setattr(form, attribute, lambda *args: replacement(*args, original))
    with pytest.raises(AssertionError, match=message):
        run((plan, calls, 1))


def test_different_forms_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LayerPlan(2, DIM, DIM, torch.float32, 2, 1, 0, (Tier("native", 3),), "mass")
    history = (plan, [torch.ones(1, 9, dtype=torch.bool)], 0)
    compare_forms(history)
    merge_many = merge.merge_many

    def backwards(*args: Any) -> None:
        """Merge by the opposite order of the tokens."""
        with pytest.MonkeyPatch.context() as patch:
            rank_by(patch, lambda *call: -untied(*call).nan_to_num(neginf=9.0))
            merge_many(*args)

    monkeypatch.setattr(merge, "merge_many", backwards)
    with pytest.raises(AssertionError, match="different tokens"):
        compare_forms(history)
