"""The decode step in C++ against the reference: the same output, tokens, codes and statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import kernel_cases
import pytest
import test_conservation as conservation
import torch
from hypothesis import example, given, settings
from kernel_cases import recorded
from reference_attention import MASKS, TOLERANCE, Layer, make_mask
from torch import Tensor

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx.errors import KernelError
from arkv_fx.kernels import Step
from arkv_fx.kernels.cpp import available, make_direct_step, make_step
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops import exchange
from arkv_fx.ops.attend import attend
from arkv_fx.plan import LayerPlan
from arkv_fx.scores import SCORES, MassScore, Stats
from arkv_fx.state.view import Segment, View, view

# How far apart ranks must be to be told apart: masses are as good as the probabilities, and held
# in float16, whose last place is up to 2**-10 of a number.
MARGIN = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
MASS = {torch.float32: 2**-10, torch.bfloat16: 1e-2, torch.float16: 1e-2}
ALL_TIERS = (
    (("native", 7),),
    (("bf16", 5), ("fp8", 20)),
    (("int8", 9),),
    (("int8", 5), ("int4", 13)),
    (("k8v4", 8), ("k4v3", 9)),
    (("k4v3", 0), ("k4v3", 6)),
    (("fp8", 6), ("k8v4", 0)),
    (("native", 0),),
)
ALL_SCORES: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    ("combined", ()),
    ("combined", (("margin", 0.2), ("value_norm", 1))),
    ("combined", (("age", 0), ("decay", 0.5))),
    ("mass", ()),
    ("mass", (("decay", 0), ("value_norm", 1), ("age", 0))),
    ("mass", (("decay", 0.999), ("value_norm", 1))),
    ("novelty", ()),
)

reason = available()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@dataclass(frozen=True)
class Case(kernel_cases.Case):
    """A prompt of ``length`` tokens, left-padded by ``pad`` per row, and ``steps`` after it.

    ``holes`` is the chance that a row's token of a step is padding.
    """

    length: int = 20
    tiers: tuple[tuple[str, int], ...] = (("k8v4", 8), ("k4v3", 9))
    steps: int = 12
    holes: float = 0.0
    score: tuple[str, tuple[tuple[str, float], ...]] = ("combined", ())

    def plan(self) -> LayerPlan:  # type: ignore[override]
        return super().plan(*self.score)


def step_of(plan: LayerPlan, make: Callable[[LayerPlan], Step | None] = make_step) -> Step:
    step = make(plan)
    assert step is not None
    return step


Call = tuple[Tensor, Tensor, Tensor, Tensor | None]


def history(case: Case) -> Iterator[tuple[Layer, Call, Knobs]]:
    """The layer before each decoded token, and the token; whoever iterates takes the step."""
    generator = torch.Generator().manual_seed(case.seed)
    layer = Layer(case.plan(), len(case.pad))
    knobs = case.knobs(generator)
    valid = torch.arange(case.length)[None] >= torch.tensor(case.pad)[:, None]
    first = make_mask(valid, case.length, kind="bool")
    layer.step(*case.inputs(generator, case.length), first, knobs, valid, fresh=True)
    for _ in range(case.steps):
        real = torch.rand(len(case.pad), 1, generator=generator) >= case.holes
        valid = torch.cat([valid, real], 1)
        mask = case.new_mask(valid, generator)
        yield layer, (*case.inputs(generator, 1), mask), knobs


class Ranks:
    """Stands in for ``exchange.rank_tokens``, remembers per head how clear decisions were."""

    def __init__(
        self, margin: float, original: Callable[..., Tensor] = exchange.rank_tokens
    ) -> None:
        self.original, self.margin = original, margin
        self.doubtful: Tensor | None = None  # [B, Hkv]
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, held: View, pos: Tensor, stats: Stats, now: Tensor, last: bool) -> Tensor:
        rank = self.original(held, pos, stats, now, last)
        least = rank.double().sort(-1).values[..., :2]
        size = rank.double().masked_fill(rank.isinf(), 0.0).abs().amax(-1)
        gap = (least[..., 1] - least[..., 0]).nan_to_num(nan=1e9)  # two empty slots: the last
        doubtful = gap <= self.margin * size
        for _ in range(8 if "mass" in stats else 0):  # masses one place further up or down
            places = torch.randint(-1, 2, pos.shape, generator=self.generator) * 2.0**-10
            others = {**stats, "mass": stats["mass"] * (1 + places)}
            other = self.original(held, pos, others, now, last)
            doubtful |= exchange._weakest(other) != exchange._weakest(rank)
        self.doubtful = doubtful if self.doubtful is None else self.doubtful | doubtful
        return rank


def advance(
    state: list[Tensor], call: Call, plan: LayerPlan, knobs: Knobs, kernel: str, margin: float
) -> tuple[Tensor, Tensor | None]:
    """One step of ``attend``; its output and the heads whose decisions were close."""
    ranks = Ranks(margin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "rank_tokens", ranks)
        out = attend(*call, state, plan, knobs, False, kernel)
    return out, ranks.doubtful


def close(name: str, x: Tensor, y: Tensor, tolerance: float, size: float = 1e-3) -> None:
    """Within a tolerance of the largest number, or of ``size`` where all are smaller."""
    assert x.shape == y.shape and x.dtype == y.dtype, name
    if not x.numel():
        return
    error = float((x.float() - y.float()).abs().max() / x.float().abs().max().clamp(min=size))
    assert error <= tolerance, f"{name}: {error:.1e}"


def compare(found: list[Tensor], expected: list[Tensor], plan: LayerPlan, sure: Tensor) -> int:
    """States agree in the heads [B, Hkv] that ``sure`` names; how many codes differ by one."""
    one, two = view(plan, found), view(plan, expected)
    assert torch.equal(one.count, two.count) and torch.equal(one.seen, two.seen), "count"
    assert torch.equal(one.bad, two.bad), "bad"
    if one.centre is not None and two.centre is not None:
        close("centre", two.centre, one.centre, 1e-5)
    for name in two.layer:
        close(name, two.layer[name], one.layer[name], 1e-5)
    for a, b in zip(one.segments, two.segments, strict=True):
        held = (s.pos.sort(-1).values[sure] for s in (a, b))
        assert torch.equal(*held), f"tier at {a.start}: other tokens"
        assert torch.equal(a.pos[sure], b.pos[sure]), f"tier at {a.start}: other slots"
    tolerance = {"mass": MASS[plan.dtype], "norm": 2**-7}
    for name, expected_stat in two.stats.items():
        x, y = expected_stat[sure], one.stats[name][sure]
        if name == "novelty":
            assert x.dtype == y.dtype and ((x.int() - y.int()).abs() <= 1).all(), name
        else:
            close(name, x, y, tolerance[name])
    return sum(
        compare_codes(a, b, sure, plan) for a, b in zip(one.segments, two.segments, strict=True)
    )


def compare_codes(found: Segment, expected: Segment, sure: Tensor, plan: LayerPlan) -> int:
    different = 0
    for (codec, a), (_, b) in zip(found.parts(), expected.parts(), strict=True):
        x, y = (codec.unpack([f[sure] for f in fields]) for fields in (a, b))
        if x.scale is None or y.scale is None:
            for p, q in zip(x.runs, y.runs, strict=True):
                torch.testing.assert_close(p, q, rtol=2**-7, atol=0.0, msg="codes")
            continue
        torch.testing.assert_close(x.scale, y.scale, rtol=2**-7, atol=0.0, msg="scales")
        if x.zero is not None and y.zero is not None:
            assert ((x.zero - y.zero).abs() <= codec._unit() * 1.01).all(), "zeros"  # type: ignore[attr-defined]
        if codec.name == "fp8":
            runs = [(a[0][sure].int(), b[0][sure].int())]
        else:
            runs = [(p * u, q * u) for p, q, u in zip(x.runs, y.runs, x.units, strict=True)]
        for p, q in runs:
            assert ((p - q).abs() <= 1).all(), "codes"
            different += int((p != q).sum())
    return different


Change = Callable[[View, View], None]


def check(
    case: Case, other: Callable[[LayerPlan], LayerPlan] | None = None, broken: Change | None = None
) -> int:
    """Every step from the reference's state, both ways; how many heads were compared.

    ``other`` is what the step is told in place of the plan, and ``broken`` spoils the state it
    leaves, given that before it.
    """
    torch.set_num_threads(case.threads)
    plan, compared, different = case.plan(), 0, 0
    told = other(plan) if other else plan
    step, direct = step_of(told), step_of(told, make_direct_step)
    for layer, call, knobs in history(case):
        state = [t.clone() for t in layer.state.tensors]
        before = [t.clone() for t in state]
        out = step(*call, state, knobs)
        twin = [t.clone() for t in before]
        assert torch.equal(direct(*call, twin, knobs), out), "the direct step's output"
        assert all(torch.equal(*pair) for pair in zip(twin, state, strict=True)), "its state"
        expected, doubtful = advance(
            layer.state.tensors, call, plan, knobs, "reference", MARGIN[case.dtype]
        )
        assert not torch.isnan(out).any() and out.is_contiguous()
        # Values are of order one, and a sum of few columns may cancel.
        close("output", expected, out, TOLERANCE[case.dtype], size=0.3)
        if broken:
            broken(view(plan, state), view(plan, before))
        sure = torch.ones(len(case.pad), case.heads, dtype=torch.bool)
        if doubtful is not None:
            sure = ~doubtful
        different += compare(state, layer.state.tensors, plan, sure)
        compared += int(sure.sum())
    # A rotation sums in another order, and a code on the edge falls the other way.
    codes = case.steps * len(case.pad) * case.heads * (case.k_dim + case.v_dim)
    assert different <= 4 + codes // 50, f"{different} of at most {codes} codes differ"
    return compared


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tiers = draw(st.sampled_from(ALL_TIERS))
    names = {name for name, _ in tiers}
    step = 8 if "k4v3" in names or "k8v4" in names else 2 if "int4" in names else 1
    dims = st.one_of(st.integers(1, 40 // step).map(lambda n: n * step), st.sampled_from((64, 128)))
    length = draw(st.integers(1, 30))
    pad = draw(st.lists(st.integers(0, length), min_size=1, max_size=3).map(tuple))
    holes = draw(st.sampled_from((0.0, 0.3)))
    return Case(
        length=length,
        pad=pad,
        holes=holes,
        heads=draw(st.integers(1, 3)),
        groups=draw(st.one_of(st.integers(1, 9), st.just(17))),
        k_dim=draw(dims),
        v_dim=draw(dims),
        tiers=tiers,
        window_format=draw(st.sampled_from(("native", "bf16"))),
        score=draw(st.sampled_from(ALL_SCORES)),
        sliding=draw(st.sampled_from((0, 0, 9, 17))),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16))),
        mask=draw(st.sampled_from(MASKS if not any(pad) and not holes else MASKS[1:])),
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0))),
        sink_logits=draw(st.booleans()),
        threads=draw(st.sampled_from((1, 2))),
        seed=draw(st.integers(0, 999)),
        balanced=draw(st.booleans()),
        short=draw(st.booleans()),
    )


# Enough work for two threads, which small shapes are not given.
LARGE = Case(
    300,
    (0, 7),
    3,
    8,
    128,
    128,
    steps=4,
    holes=0.3,
    tiers=(("k8v4", 100), ("k4v3", 150)),
    mask="bool",
)


@settings(max_examples=30)
@given(case=cases())
@example(replace(LARGE, threads=2))
@example(replace(LARGE, threads=2, dtype=torch.bfloat16, mask="bool-heads"))
@example(Case(length=1, steps=40))
@example(replace(LARGE, threads=2, dtype=torch.float16, balanced=True))
@example(Case(length=1, steps=40, dtype=torch.bfloat16, k_dim=64, v_dim=64))
@example(replace(LARGE, threads=2, short=True))
@example(replace(LARGE, threads=2, short=True, sliding=200, mask="bool-heads"))
@example(Case(pad=(0, 20), steps=20, holes=0.5, mask="lowest"))  # a row that is all padding
def test_it_equals_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("score", ALL_SCORES)
def test_every_score_with_every_dtype(
    score: tuple[str, tuple[tuple[str, float], ...]], dtype: torch.dtype
) -> None:
    case = Case(
        40, (0, 3), steps=25, holes=0.1, k_dim=32, v_dim=24, score=score, dtype=dtype, mask="bool"
    )
    assert check(case) > 25, "hardly any decision is clear"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tiers", ["native", "bf16", "fp8", "int8", "int4", "k8v4", "k4v3"])
def test_every_format_with_every_dtype(tiers: str, dtype: torch.dtype) -> None:
    for dims in ((128, 128), (64, 64), (24, 40)):
        check(Case(30, (0, 9), 2, 3, *dims, ((tiers, 5), (tiers, 20)), dtype=dtype,
                   mask="bool"))  # fmt: skip


def test_attend_takes_it() -> None:
    """For one token, and only with the kernel and the scores that it is for."""
    layer, call, knobs = next(history(Case()))
    state = [t.clone() for t in layer.state.tensors]
    expected = step_of(layer.plan)(*call, state, knobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "rank_tokens", None)  # not needed any more
        out = attend(*call, layer.state.tensors, layer.plan, knobs, False, "cpp")
    assert torch.equal(out, expected)
    assert all(torch.equal(*pair) for pair in zip(state, layer.state.tensors, strict=True))


class Better(MassScore):
    """A user's own score with one of ours as its base."""

    name = "better"


def test_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    for score in ALL_SCORES:
        assert make_step(Case(score=score).plan())
    monkeypatch.setitem(SCORES, "better", Better)
    for name in ("paper", "better"):
        layer, call, knobs = next(history(Case(score=(name, ()))))
        assert make_step(layer.plan) is None and make_direct_step(layer.plan) is None
        attend(*call, layer.state.tensors, layer.plan, knobs, False, "cpp")
        assert (layer.state.view().seen == 21).all()


def test_other_devices_and_dtypes() -> None:
    layer, (q, k, v, mask), knobs = next(history(Case()))
    for wrong in (q.to("meta"), q.double(), q.bfloat16()):
        with pytest.raises(KernelError, match="choose the kernel 'reference'"):
            step_of(layer.plan)(wrong, k, v, mask, layer.state.tensors, knobs)
        with pytest.raises(KernelError, match="choose the kernel 'reference'"):
            step_of(layer.plan, make_direct_step)(wrong, k, v, mask, layer.state.tensors, knobs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_not_finite_is_flagged(number: float, where: str, dtype: torch.dtype) -> None:
    layer, (q, k, v, mask), knobs = next(history(Case(pad=(0, 0), dtype=dtype)))
    (k if where == "k" else v)[1, 1, 0, 13] = number
    step_of(layer.plan)(q, k, v, mask, layer.state.tensors, knobs)
    assert layer.state.view().bad.tolist() == [0, 1]
    *_, (q, k, v, mask) = (call for _, call, _ in history(Case(pad=(0, 0), dtype=dtype)))
    step_of(layer.plan)(q, k, v, mask, layer.state.tensors, knobs)
    assert layer.state.view().bad.tolist() == [0, 1], "the flag stays"


def test_noncontiguous_tensors_and_broadcast_masks() -> None:
    layer, (q, k, v, mask), knobs = next(history(Case(pad=(0, 3), mask="bool-heads")))
    results = []
    assert mask is not None
    strided = mask.repeat_interleave(2, -1)[..., ::2]
    for call in ((q, k, v, mask), (*(x.mT.contiguous().mT for x in (q, k, v)), strided)):
        state = [t.clone() for t in layer.state.tensors]
        results.append([step_of(layer.plan)(*call, state, knobs), *state])
    one = mask[:1, :1].expand(mask.shape)
    for call in ((q, k, v, mask[:1, :1]), (q, k, v, one), (q, k, v, one.contiguous())):
        state = [t.clone() for t in layer.state.tensors]
        results.append([step_of(layer.plan)(*call, state, knobs), *state])
    for group in (results[:2], results[2:]):
        for other in group[1:]:
            assert all(torch.equal(*pair) for pair in zip(group[0], other, strict=True))


# The step past the dispatcher


def test_the_direct_step_reads_addresses_anew() -> None:
    """Beam search replaces tensors, another sequence has its own, and two may take turns."""
    layer, (q, k, v, _), knobs = next(history(Case(pad=(0, 0, 0))))
    direct, step = step_of(layer.plan, make_direct_step), step_of(layer.plan)
    state, other = layer.state, copy.deepcopy(layer.state)
    for rows in (None, [2, 0, 0], [1, 1, 2], [1], None):
        if rows is not None:
            state.select(torch.tensor(rows))
        for held in (state, other, other):
            part = tuple(x[: held.batch] for x in (q, k, v))
            twin = [t.clone() for t in held.tensors]
            out = direct(*part, None, held.tensors, knobs)
            assert torch.equal(out, step(*part, None, twin, knobs))
            assert all(torch.equal(*pair) for pair in zip(twin, held.tensors, strict=True))


def test_the_direct_step_takes_strided_and_watched_tensors() -> None:
    layer, call, knobs = next(history(Case(pad=(0, 0), dtype=torch.bfloat16)))
    results = []
    for make in (make_step, make_direct_step):
        q, k, v = (x.mT.contiguous().mT.requires_grad_() for x in call[:3])
        state = [t.clone() for t in layer.state.tensors]
        out = step_of(layer.plan, make)(q, k, v, None, state, knobs)
        assert not out.requires_grad
        results.append([out, *state])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


Break = Callable[[list[Tensor]], list[Tensor]]
WRONG: dict[str, Break] = {
    "other batch": lambda s: [t[:1] for t in s],
    "other dtype": lambda s: [t.to(torch.int16) if t.dtype == torch.int8 else t for t in s],
    "fewer": lambda s: s[:-1],
    "strided": lambda s: [t.mT.contiguous().mT if t.dim() == 4 else t for t in s],
    "elsewhere": lambda s: [t.to("meta") for t in s],
    "other slots": lambda s: [t[:, :, :-1].contiguous() if t.dim() == 4 else t for t in s],
}


@pytest.mark.parametrize("name", WRONG)
def test_the_direct_step_refuses_another_state(name: str) -> None:
    layer, (q, k, v, _), knobs = next(history(Case(pad=(0, 0))))
    step, state = step_of(layer.plan, make_direct_step), layer.state.tensors
    for _ in range(2):
        step(q, k, v, None, state, knobs)
        with pytest.raises(KernelError, match="not those of its plan"):
            step(q, k, v, None, WRONG[name](state), knobs)


def test_the_direct_step_refuses_other_shapes() -> None:
    layer, (q, k, v, _), knobs = next(history(Case(pad=(0, 0))))
    step, state = step_of(layer.plan, make_direct_step), layer.state.tensors
    for _ in range(2):
        step(q, k, v, None, state, knobs)
        for call in (
            (q[:, 1:], k, v), (q[..., 1:].contiguous(), k, v), (q, k[:, :1].contiguous(), v),
            (q, k, v[..., 1:].contiguous()), (q[:1], k[:1], v[:1]), (q, torch.cat([k, k], 2), v),
        ):  # fmt: skip
            with pytest.raises(KernelError, match="not those of its plan"):
                step(*(x.contiguous() for x in call), None, state, knobs)


# A long run


class CppLayer(Layer):
    """A layer that decodes by the C++ step."""

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, knobs: Knobs, valid: Tensor,
        fresh: bool = False,
    ) -> Tensor:  # fmt: skip
        out = attend(q, k, v, mask, self.state.tensors, self.plan, knobs, fresh, "cpp")
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.valid = torch.cat([self.valid, valid], 1)
        assert out.isfinite().all()
        return out


@pytest.mark.parametrize(
    "case",
    [
        Case(heads=2, tiers=(("int8", 6), ("int4", 7)), holes=0.2),
        Case(heads=2, tiers=(("native", 3), ("fp8", 5)), dtype=torch.bfloat16, sliding=11),
    ],
)
def test_a_long_run_conserves_tokens(case: Case) -> None:
    dims = {"k_dim": conservation.DIM, "v_dim": conservation.DIM}
    layer = CppLayer(replace(case, **dims).plan(), 2)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    evicted: list[list[set[int]]] = [[set(), set()] for _ in range(layer.batch)]
    for number in range(500):
        before = conservation.where(layer) if number % 5 == 4 else None
        valid = torch.rand(2, 1, generator=generator) >= case.holes
        conservation.step(layer, valid, generator)
        if before is not None:
            conservation.check(layer, before, evicted)
    assert all(t.isfinite().all() for t in layer.state.tensors if t.is_floating_point())


# Tracing


@pytest.mark.parametrize("case", [Case(), Case(mask="additive-heads", sink_logits=True)])
def test_operator_is_well_formed(case: Case) -> None:
    layer, call, knobs = next(history(case))
    operator = torch.ops.arkv_cpu.step.default
    args = recorded(operator, lambda: step_of(layer.plan)(*call, layer.state.tensors, knobs))
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("case", [Case(), Case(pad=(0, 2), mask="bool", dtype=torch.bfloat16)])
def test_it_compiles_as_one_graph(case: Case) -> None:
    layer, call, knobs = next(history(case))
    state = [t.clone() for t in layer.state.tensors]
    text = layer.plan.to_json()

    def decode(call: Call, state: list[Tensor]) -> Tensor:
        out: Tensor = torch.ops.arkv.attend(
            *call, state, text, knobs.scale, knobs.softcap, None, False, "cpp"
        )
        return out + 0

    expected = step_of(layer.plan)(*call, state, knobs)
    pointers = [t.data_ptr() for t in layer.state.tensors]
    out = torch.compile(decode, fullgraph=True)(call, layer.state.tensors)
    assert torch.equal(out, expected)
    assert pointers == [t.data_ptr() for t in layer.state.tensors]
    assert all(torch.equal(*pair) for pair in zip(state, layer.state.tensors, strict=True))


# Negative controls: the comparison must notice each of these.


def _options(**changed: float) -> Callable[[LayerPlan], LayerPlan]:
    return lambda plan: replace(plan, score_options=tuple(changed.items()))


def _dropped(held: View, before: View) -> None:
    """What left the ring is nowhere."""
    for tier in held.tiers:
        old = before.pos[..., tier.start : tier.start + tier.slots]
        tier.pos.masked_fill_(tier.pos != old, -1)


def _stays(held: View, before: View) -> None:
    assert held.centre is not None and before.centre is not None
    held.centre.copy_(before.centre)


def _other_codes(held: View, before: View) -> None:
    for field, old in zip(held.tiers[0].k, before.tiers[0].k, strict=True):
        field.copy_(old)


def _other_mass(held: View, before: View) -> None:
    held.stats["mass"][..., : held.ring.slots] = before.stats["mass"][..., : held.ring.slots]


BROKEN: dict[str, tuple[Case, dict[str, Any], str]] = {
    "margin": (Case(), {"other": _options(margin=-3)}, "other tokens"),
    "decay": (Case(), {"other": _options(decay=0.5)}, "other tokens|other slots|mass"),
    "age": (Case(), {"other": _options(age=0)}, "other tokens"),
    "sliding window": (
        Case(sliding=9),
        {"other": lambda plan: replace(plan, sliding=30)},
        "output",
    ),
    "a centre that stays": (Case(length=3), {"broken": _stays}, "centre"),
    "a demoted token dropped": (Case(), {"broken": _dropped}, "other tokens"),
    "codes not written": (Case(), {"broken": _other_codes}, "codes|scales|zeros"),
    "masses not written": (Case(), {"broken": _other_mass}, "mass"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_step_is_noticed(name: str) -> None:
    case, change, message = BROKEN[name]
    case = replace(case, length=case.length if case.length < 5 else 40, steps=25)
    check(case)
    with pytest.raises(AssertionError, match=message):
        check(case, **change)
