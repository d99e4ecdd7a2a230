"""Scores against their formulas written out again, and what each is for: hitters and needles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_attention import Layer, Tokens, make_mask
from torch import Tensor

from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.scores import SCORES, Observation, make_score
from arkv_fx.scores.combined import CombinedScore
from arkv_fx.scores.mass import UNIT, MassScore
from arkv_fx.scores.novelty import NoveltyScore
from arkv_fx.scores.paper import PaperScore
from arkv_fx.scores.score import zscore

HEADS, GROUPS, DIM, WINDOW, SCALE = 2, 2, 8, 4, 0.5
KNOBS = Knobs(SCALE)
GAMMA = 263.8108280337562  # as published
HALF = 2.0**-11  # of a number, by which rounding to half precision moves it at most


def layer_of(score: str, slots: int, sinks: int = 0, batch: int = 1, **options: float) -> Layer:
    tiers = (Tier("native", slots // 2), Tier("native", slots - slots // 2))
    plan = LayerPlan(HEADS, DIM, DIM, torch.float32, WINDOW, sinks, 0, tiers, score,
                     tuple(sorted(options.items())))  # fmt: skip
    return Layer(plan, batch)


def probabilities(q: Tensor, tokens: Tokens, last: int) -> Tensor:
    """[Lq, N] attention of queries [Lq, D], the last of them at position `last`."""
    rows = []
    for i, query in enumerate(q):
        now = last - len(q) + 1 + i
        logits = [
            float(query @ k) * SCALE if pos <= now else -math.inf
            for pos, k in zip(tokens.pos, tokens.k, strict=True)
        ]
        rows.append(torch.softmax(torch.tensor(logits, dtype=torch.float64), 0))
    return torch.stack(rows)


def stat(layer: Layer, name: str, b: int, h: int) -> dict[int, float]:
    """A statistic by position, of the tokens beyond the ring."""
    out = {}
    for tier in layer.state.view().tiers:
        for pos, x in zip(tier.pos[b, h].tolist(), tier.stats[name][b, h].tolist(), strict=True):
            if pos >= 0:
                out[pos] = x
    return out


def step(layer: Layer, length: int, generator: torch.Generator, mask: Tensor | None = None,
         valid: Tensor | None = None) -> Tensor:  # fmt: skip
    """One call with random numbers; returns the queries [B, Hq, T, D]."""
    q, k, v = (torch.randn(layer.batch, h, length, DIM, generator=generator) * s
               for h, s in ((HEADS * GROUPS, 2), (HEADS, 1), (HEADS, 1)))  # fmt: skip
    if valid is None:
        valid = torch.ones(layer.batch, length, dtype=torch.bool)
    layer.step(q, k, v, mask, KNOBS, valid, fresh=layer.seen == 0)
    return q


# The paper's score


def paper_score(q: Tensor, tokens: Tokens, last: int) -> dict[int, float]:
    """mean + gamma * variance over the queries [G, Lq, D], mean over G, pooled over 5 tokens."""
    order = sorted(range(len(tokens.pos)), key=lambda i: tokens.pos[i])
    before = [i for i in order if tokens.pos[i] <= last - WINDOW]
    scores = []
    for i in before:
        per_head = []
        for group in q:
            p = probabilities(group, tokens, last)[:, i]
            mean = sum(p) / len(p)
            variance = sum((x - mean) ** 2 for x in p) / len(p)
            per_head.append(float(mean + GAMMA * variance))
        scores.append(sum(per_head) / len(per_head))
    padded = [0.0, 0.0, *scores, 0.0, 0.0]
    return {tokens.pos[i]: sum(padded[n : n + 5]) / 5 for n, i in enumerate(before)}


def check_paper(slots: int, steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = layer_of("paper", slots)
    q = step(layer, 14, generator)
    for number in range(steps):
        for h in range(HEADS):
            heads = q[0, h * GROUPS : (h + 1) * GROUPS]
            if number == 0:
                tokens = layer.everything()[0][h]
                expected = paper_score(heads[:, -WINDOW:], tokens, layer.seen - 1)
            else:
                new = Tokens([layer.seen - 1], layer.k[0, h, -1:], layer.v[0, h, -1:])
                old = before[h]  # type: ignore[name-defined]  # noqa: F821
                tokens = Tokens(old.pos + new.pos, torch.cat([old.k, new.k]), old.v)
                expected = paper_score(heads, tokens, layer.seen - 1)
            found = stat(layer, "mass", 0, h)
            assert found, "nothing to compare"
            for pos, score in found.items():
                assert score == pytest.approx(expected[pos], rel=1e-4), f"position {pos}"
        before = layer.held()[0]  # noqa: F841
        q = step(layer, 1, generator)


@pytest.mark.parametrize("slots", [40, 6], ids=["all kept", "evicting"])
def test_the_papers_score_is_the_published_formula(slots: int) -> None:
    """On a prompt and, recomputed from one query, while decoding."""
    check_paper(slots)


@pytest.mark.parametrize(("attribute", "value"), [("gamma", 0.0), ("kernel", 1), ("kernel", 3)])
def test_another_formula_is_noticed(
    attribute: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    monkeypatch.setattr(make_score("paper"), attribute, value)
    with pytest.raises(AssertionError, match="position"):
        check_paper(40, steps=1)


def test_the_prompts_best_by_the_paper_stay() -> None:
    """Originals are the largest scores, Quantized the next ones, the rest is gone."""
    layer = layer_of("paper", 6)
    q = step(layer, 20, torch.Generator().manual_seed(3))
    for h in range(HEADS):
        tokens = layer.everything()[0][h]
        scores = paper_score(q[0, h * GROUPS : (h + 1) * GROUPS, -WINDOW:], tokens, 19)
        best = sorted(scores, key=lambda pos: -scores[pos])
        first, second = (set(t.pos[0, h].tolist()) for t in layer.state.view().tiers)
        assert first == set(best[:3]) and second == set(best[3:6])


def test_variance_counts_only_real_queries() -> None:
    """A prompt with two real tokens has two queries, whatever its padding."""
    valid = torch.tensor([[False] * 8 + [True] * 6, [True] * 14])
    padded, alone = layer_of("paper", 20, batch=2), layer_of("paper", 20)
    mask = make_mask(valid, 14, kind="bool")
    step(padded, 14, torch.Generator().manual_seed(1), mask, valid)
    q, k, v = padded.k[:1, :, 8:], padded.k[:1, :, 8:], padded.v[:1, :, 8:]
    assert q.shape[2] == 6
    # The same queries again: step() draws them first.
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(2, HEADS * GROUPS, 14, DIM, generator=generator)[:1, :, 8:] * 2
    alone.step(queries, k, v, None, KNOBS, torch.ones(1, 6, dtype=torch.bool), fresh=True)
    for h in range(HEADS):
        shifted = {pos + 8: x for pos, x in stat(alone, "mass", 0, h).items()}
        assert stat(padded, "mass", 0, h) == pytest.approx(shifted, rel=1e-4)


# Mass


def test_mass_is_an_average_over_the_queries_of_a_tokens_life() -> None:
    """Step by step: m <- d m + (1 - d) p, and its rank is the weighted mean of all p."""
    decay = 0.8
    layer = layer_of("mass", 60, decay=decay)
    generator = torch.Generator().manual_seed(0)
    seen: list[list[dict[int, float]]] = []  # [step][head][position]
    for _ in range(12):
        q = step(layer, 1, generator)
        seen.append([])
        for h in range(HEADS):
            tokens = layer.everything()[0][h]
            p = sum(probabilities(q[0, h * GROUPS + g], tokens, layer.seen - 1)
                    for g in range(GROUPS))  # fmt: skip
            seen[-1].append(dict(zip(tokens.pos, p[0].tolist(), strict=True)))  # type: ignore[index]
    for h in range(HEADS):
        found = stat(layer, "mass", 0, h)
        assert len(found) == 8
        for pos, mass in found.items():
            expected, weights, total = 0.0, 0.0, 0.0
            for number in range(pos, 12):
                p = seen[number][h][pos]
                expected = decay * expected + (1 - decay) * p
                weights = decay * weights + 1
                total = decay * total + p
            assert mass * UNIT == pytest.approx(expected, rel=HALF / (1 - decay))
            rank = MassScore(decay).precision(
                {"mass": torch.tensor(mass)}, torch.tensor(11.0 - pos), torch.tensor(True)
            )
            assert float(rank) * UNIT == pytest.approx(total / weights, rel=HALF / (1 - decay))


def observation(probs: Tensor, start: int, steps: Tensor, window: int = 99) -> Observation:
    """Queries [Q] from position `start` on over N old columns."""
    queries, columns = probs.shape[-2:]
    return Observation(
        probs=probs, real=torch.ones(1, queries, dtype=torch.bool),
        query_pos=torch.arange(start, start + queries)[None],
        pos=torch.arange(columns).expand(1, 1, -1), steps=steps, window=window,
    )  # fmt: skip


@given(
    decay=st.sampled_from((0.0, 0.5, 0.9, 0.99, 0.999)),
    queries=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_chunk_moves_the_mass_as_its_queries_do_one_by_one(
    decay: float, queries: int, seed: int
) -> None:
    """Exactly so if every query is observed and sees the same: the closed form of the average.

    But for a rounding in each step, where the average is held in half precision.
    """
    generator = torch.Generator().manual_seed(seed)
    score = MassScore(decay)
    probs = torch.rand(1, 1, 3, 1, 5, generator=generator).expand(-1, -1, -1, queries, -1)
    mass = torch.rand(1, 1, 5, generator=generator)
    by_step = {"mass": mass}
    for i in range(queries):
        one = observation(probs[..., :1, :], 5 + i, torch.ones(1, 1, 5))
        by_step = score.observe(by_step, one)
    chunk = score.observe({"mass": mass}, observation(probs, 5, torch.full((1, 1, 5), queries)))
    a, b = chunk["mass"], by_step["mass"]
    lost = (queries + 1) * HALF if a.dtype == torch.float16 else 1e-4
    torch.testing.assert_close(a.float(), b.float(), atol=1e-6, rtol=lost)


def test_a_prompts_mass_is_the_mean_of_what_its_last_queries_gave() -> None:
    """Moved by as many steps as the token has lived; a token is judged by those that saw it."""
    decay, length = 0.9, 13
    layer = layer_of("mass", 60, decay=decay)
    q = step(layer, length, torch.Generator().manual_seed(0))
    for h in range(HEADS):
        tokens = layer.everything()[0][h]
        p = sum(probabilities(q[0, h * GROUPS + g, -WINDOW:], tokens, length - 1)
                for g in range(GROUPS))  # fmt: skip
        for pos, mass in stat(layer, "mass", 0, h).items():
            mean = float(p[:, pos].sum()) / WINDOW  # type: ignore[index]
            moved = (1 - decay ** (length - pos)) * mean
            assert mass * UNIT == pytest.approx(moved, rel=1.1 * HALF)


def test_age_and_norm_weigh_the_mass() -> None:
    stats = {"mass": torch.tensor([0.1, 0.1]), "norm": torch.tensor([1.0, 3.0])}
    age, valid = torch.tensor([0.0, 9.0]), torch.ones(2, dtype=torch.bool)
    plain = MassScore(0.9, age=0).precision(stats, age, valid)
    aged = MassScore(0.9).precision(stats, age, valid)
    normed = MassScore(0.9, value_norm=1).precision(stats, age, valid)
    assert torch.equal(plain, stats["mass"])
    assert aged.tolist() == pytest.approx([0.1 / 0.1, 0.1 / (1 - 0.9**10)])
    assert torch.equal(normed, aged * stats["norm"])
    assert [f.name for f in MassScore(value_norm=1).slot_fields] == ["mass", "norm"]


def test_norms_are_of_the_values() -> None:
    layer = layer_of("mass", 40, value_norm=1)
    step(layer, 12, torch.Generator().manual_seed(0))
    for h in range(HEADS):
        for pos, norm in stat(layer, "norm", 0, h).items():
            assert norm == pytest.approx(float(layer.v[0, h, pos].norm()), rel=2**-7)


@pytest.mark.parametrize("score", SCORES)
def test_a_prompt_is_a_chunk_on_an_empty_cache(score: str) -> None:
    """The fused and the written-out attention leave the same statistics."""
    # Means of few random codes are often equal, and then the order in a tier decides.
    options = {"ahead": 0} if "novelty" in {f.name for f in make_score(score).slot_fields} else {}
    prompt, chunk = (layer_of(score, 12, sinks=1, **options) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 30, DIM, generator=generator) for h in (4, 2, 2))
    valid = torch.ones(1, 30, dtype=torch.bool)
    for layer, fresh in ((prompt, True), (chunk, False)):
        layer.step(q, k, v, None, KNOBS, valid, fresh)
    for a, b in zip(prompt.state.view().segments, chunk.state.view().segments, strict=True):
        order, other = a.pos.argsort(), b.pos.argsort()
        assert torch.equal(a.pos.gather(-1, order), b.pos.gather(-1, other))
        for name, x in a.stats.items():
            x, y = x.gather(-1, order), b.stats[name].gather(-1, other)
            lost = {torch.int8: (1.0, 0.0), torch.float16: (1e-5, 2 * HALF)}  # one place
            atol, rtol = lost.get(x.dtype, (1e-5, 1e-4))
            torch.testing.assert_close(x.float(), y.float(), atol=atol, rtol=rtol)


# Novelty


def test_novelty_is_less_the_cosine_with_the_mean_key() -> None:
    layer = layer_of("novelty", 40, values=0, ahead=0)
    generator = torch.Generator().manual_seed(0)
    for length in (9, 1, 5, 1):
        start = layer.seen
        step(layer, length, generator)
        for h in range(HEADS):
            unit = layer.k[0, h].double()
            unit = unit / unit.norm(dim=-1, keepdim=True)
            mean = unit.mean(0)
            found = stat(layer, "novelty", 0, h)
            for pos in range(start, layer.seen):
                if pos in found:  # of this call's tokens, what is not in the ring
                    expected = -127 * float(unit[pos] @ mean / mean.norm())
                    assert found[pos] == pytest.approx(expected, abs=0.501)


def haystack(score: str, decode: int = 0, **options: float) -> Layer:
    """48 tokens with much the same key; only the needle points elsewhere, where no query looks."""
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(score, 10, **options)
    common = torch.nn.functional.normalize(torch.randn(DIM, generator=generator), dim=0)

    def call(length: int, start: int) -> None:
        noise = torch.randn(1, HEADS, length, DIM, generator=generator)
        k = 3 * common + 0.4 * noise
        if start <= NEEDLE < start + length:
            k[:, :, NEEDLE - start] = -3 * common + noise[:, :, 0]
        q = 2 * common + 0.4 * torch.randn(1, HEADS * GROUPS, length, DIM, generator=generator)
        v = torch.randn(1, HEADS, length, DIM, generator=generator)
        valid = torch.ones(1, length, dtype=torch.bool)
        layer.step(q, k, v, None, KNOBS, valid, fresh=start == 0)

    call(48, 0)
    for i in range(decode):
        call(1, 48 + i)
    return layer


NEEDLE = 13


def kept(layer: Layer) -> bool:
    positions = [set(t.pos) for t in layer.held()[0]]
    assert all(len(x) == 14 for x in positions)
    return all(NEEDLE in x for x in positions)


def test_novelty_finds_the_needle() -> None:
    layer = haystack("novelty")
    for h in range(HEADS):
        found = stat(layer, "novelty", 0, h)
        assert max(found, key=lambda pos: found[pos]) == NEEDLE
    assert kept(haystack("novelty", decode=30))


@pytest.mark.parametrize("decode", [0, 30])
def test_combined_keeps_the_needle_that_mass_evicts(decode: int) -> None:
    assert kept(haystack("combined", decode))
    assert not kept(haystack("mass", decode)), "the needle is no needle"


def test_combined_without_its_novelty_loses_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(NoveltyScore, "precision", lambda self, stats, *_: stats["novelty"] * 0)
    monkeypatch.setattr(CombinedScore, "eviction", lambda self, *args: self.mass.precision(*args))
    assert not kept(haystack("combined"))


def test_combined_keeps_heavy_hitters_too() -> None:
    """What attention looks at stays although its key is like all others."""
    score = CombinedScore()
    n = 20
    stats = {"mass": torch.full((1, 1, n), 0.01), "novelty": torch.rand(1, 1, n) * 0.1}
    stats["mass"][..., 7] = 0.9
    stats["novelty"][..., 3] = 1.5
    stats["novelty"][..., 7] = 0.0
    age, valid = torch.full((1, 1, n), 5.0), torch.ones(1, 1, n, dtype=torch.bool)
    rank = score.eviction(stats, age, valid)[0, 0]
    assert set(rank.topk(2).indices.tolist()) == {3, 7}
    assert torch.equal(score.precision(stats, age, valid), score.mass.precision(stats, age, valid))
    assert int(score.precision(stats, age, valid).argmax()) == 7


def test_the_zscore_ignores_empty_slots() -> None:
    x = torch.tensor([[[1.0, 2.0, 4.0, 99.0, -7.0]]])
    valid = torch.tensor([[[True, True, True, False, False]]])
    expected = (x[..., :3] - x[..., :3].mean()) / x[..., :3].std(correction=0)
    torch.testing.assert_close(zscore(x, valid)[..., :3], expected, atol=1e-4, rtol=1e-4)
    assert zscore(x, torch.zeros_like(valid)).isfinite().all()
    assert zscore(torch.ones(1, 1, 3), valid[..., :3]).abs().max() == 0


# All scores


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_finite_and_per_head(name: str) -> None:
    """Whatever the history; heads that see other things rank otherwise."""
    layer = layer_of(name, 8)
    generator = torch.Generator().manual_seed(0)
    for length in (1, 1, 7, 1, 1, 12, 1):
        step(layer, length, generator)
        for segment in layer.state.view().segments:
            assert all(x.isfinite().all() for x in segment.stats.values())
    positions = [set(t.pos) for t in layer.held()[0]]
    assert positions[0] != positions[1]


@pytest.mark.parametrize("build", [PaperScore, MassScore, NoveltyScore, CombinedScore])
def test_scores_are_registered_under_their_names(build: Callable[..., Any]) -> None:
    assert SCORES[build.name] is build  # type: ignore[attr-defined]
    assert make_score(build.name) is make_score(build.name)  # type: ignore[attr-defined]
