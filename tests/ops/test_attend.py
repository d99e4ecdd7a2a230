"""`attend` against attention from its definition: nothing evicted, whatever the order of calls."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from reference_attention import (
    MASKS,
    TOLERANCE,
    Layer,
    Tokens,
    join,
    make_mask,
    reference_attention,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import arkv_fx.kernels.reference as reference
import arkv_fx.kernels.softmax as attention_module
import arkv_fx.ops.attend as attend_module
import arkv_fx.ops.blocks as blocks
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan, Tier


@dataclass(frozen=True)
class Case:
    """One layer and the lengths of the calls it gets; `pad` are left padding tokens per row."""

    lengths: tuple[int, ...]
    pad: tuple[int, ...] = (0,)
    heads: int = 2
    groups: int = 2
    k_dim: int = 8
    v_dim: int = 8
    window: int = 4
    sinks: int = 2
    tiers: tuple[tuple[str, int], ...] = (("native", 64),)
    sliding: int = 0
    dtype: torch.dtype = torch.float32
    mask: str = "bool"
    scale: float = 0.35
    softcap: float = 0.0
    sink_logits: bool = False
    score: str = "combined"
    window_format: str = "native"
    fresh: bool = True
    seed: int = 0

    def plan(self) -> LayerPlan:
        return LayerPlan(
            self.heads, self.k_dim, self.v_dim, self.dtype, self.window, self.sinks, self.sliding,
            tuple(Tier(*t) for t in self.tiers), self.score, (), self.window_format,
        )  # fmt: skip


def check(case: Case, over: str = "everything") -> None:
    """Every call's output equals the definition over all tokens, or over the slots as they are."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, query_heads = len(case.pad), case.heads * case.groups
    layer = Layer(case.plan(), batch)
    sink_logits = normal(query_heads) if case.sink_logits else None
    knobs = Knobs(case.scale, case.softcap, sink_logits)
    for number, length in enumerate(case.lengths):
        q = (normal(batch, query_heads, length, case.k_dim) * 2).to(case.dtype)
        k = normal(batch, case.heads, length, case.k_dim).to(case.dtype)
        v = normal(batch, case.heads, length, case.v_dim).to(case.dtype)
        start = layer.seen
        position = torch.arange(start, start + length)
        valid = position[None] >= torch.tensor(case.pad)[:, None]
        mask = make_mask(
            torch.cat([layer.valid, valid], 1), length, kind=case.mask, heads=query_heads,
            sliding=case.sliding, dtype=case.dtype, generator=generator,
        )  # fmt: skip
        held = layer.held()
        out = layer.step(q, k, v, mask, knobs, valid, fresh=case.fresh and number == 0)
        if over == "everything":
            held = layer.everything()
        else:
            new = [[Tokens(position.tolist(), k[b, h], v[b, h]) for h in range(case.heads)]
                   for b in range(batch)]  # fmt: skip
            held = join(held, new)
        expected = reference_attention(
            q, start, held, scale=case.scale, mask=mask, sliding=case.sliding,
            softcap=case.softcap, sink_logits=sink_logits,
        )  # fmt: skip
        assert out.dtype == case.dtype and out.shape == expected.shape
        # A query that sees nothing gives zeros, and not only nearly.
        assert (out[(expected == 0).all(-1)] == 0).all()
        error = float((out.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
        assert error <= TOLERANCE[case.dtype], f"call {number} of {case}: {error:.1e}"


@st.composite
def cases(draw: st.DrawFn, tiers: str = "native") -> Case:
    lengths = draw(
        st.one_of(
            st.integers(1, 20).map(lambda n: (n,)),  # a whole prefill
            st.integers(2, 14).map(lambda n: (n, *[1] * 6)),  # and then decoding
            st.lists(st.integers(1, 8), min_size=2, max_size=5).map(tuple),  # chunks
            st.tuples(st.integers(2, 8), st.integers(1, 3), st.integers(2, 8)).map(
                lambda x: (x[0], *[1] * x[1], x[2], 1, 1)  # turns
            ),
        )
    )
    total = sum(lengths)
    sliding = draw(st.sampled_from((0, 0, 1, 3, 7)))
    window = draw(st.integers(1, min(6, sliding or 6)))
    sinks = 0 if sliding else draw(st.integers(0, 3))
    if tiers == "native":
        # A sliding layer holds exactly its window; another one everything, in one tier or two.
        needed = max(0, sliding - window) if sliding else total
        first = draw(st.integers(0, needed))
        held = draw(
            st.sampled_from(
                ((("native", needed),), (("native", first), ("native", needed - first)))
            )
        )
    else:
        names = draw(st.sampled_from((("int8", "int4"), ("fp8", "k8v4"), ("native", "fp8"))))
        held = tuple((name, draw(st.integers(0, 6))) for name in names)
    pad = draw(
        st.one_of(
            st.just((0,)), st.lists(st.integers(0, total - 1), min_size=1, max_size=3).map(tuple)
        )
    )
    dims = (1, 3, 5, 8, 12) if tiers == "native" else (8, 24)
    return Case(
        lengths=lengths,
        pad=pad,
        heads=draw(st.integers(1, 3)),
        groups=draw(st.sampled_from((1, 2, 3))),
        k_dim=draw(st.sampled_from(dims)),
        v_dim=draw(st.sampled_from(dims)),
        window=window,
        sinks=sinks,
        tiers=held,
        sliding=sliding,
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16))),
        mask=draw(st.sampled_from(MASKS if not any(pad) else MASKS[1:])),
        scale=draw(st.sampled_from((0.2, 0.35, 1.0))),
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0))),
        sink_logits=draw(st.booleans()),
        score=draw(st.sampled_from(("combined", "mass", "novelty", "paper"))),
        window_format="native" if tiers == "native" else draw(st.sampled_from(("native", "bf16"))),
        fresh=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@settings(max_examples=120)
@given(case=cases())
@example(Case((9, 1, 1, 1, 1, 1, 1, 1), pad=(0, 3, 8)))
@example(Case((5, 4, 1, 7, 1), pad=(0, 12), mask="additive"))  # padding over several chunks
@example(Case((12, 1, 1), sliding=4, window=4, sinks=0, tiers=(("native", 0),), mask="none"))
@example(Case((6, 1), k_dim=7, v_dim=3, heads=1, groups=4, mask="additive-heads"))
def test_nothing_evicted_equals_full_attention(case: Case) -> None:
    check(case)


@settings(max_examples=60)
@given(case=cases("quantized"))
def test_quantized_tiers_equal_attention_over_what_they_hold(case: Case) -> None:
    check(case, over="slots")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many new tokens as need more than one block, without there being many."""
    monkeypatch.setattr(blocks, "LEAST", 2)
    monkeypatch.setattr(blocks, "LOGITS", 0)


@settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(case=st.one_of(cases(), cases("quantized")), over=st.sampled_from(("everything", "slots")))
@example(Case((9, 1, 8), k_dim=8, v_dim=8, mask="none"), "everything")  # in halves
@example(Case((9, 8, 7), mask="bool-heads", pad=(0, 12)), "everything")
@example(Case((9, 8, 7), sliding=5, window=5, sinks=0, mask="none"), "everything")
@example(Case((9, 8), softcap=1.5, sink_logits=True, mask="none"), "everything")
@pytest.mark.usefixtures("small_blocks")
def test_block_by_block_is_the_same(case: Case, over: str) -> None:
    native = all(name == "native" for name, _ in case.tiers)
    check(case, over if native else "slots")


@pytest.mark.usefixtures("small_blocks")
def test_a_block_that_sees_what_comes_later_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        blocks, "hide_new", lambda x, m, plan, pos, last, f=blocks.hide_new: f(x, m, plan, pos)
    )
    with pytest.raises(AssertionError):
        check(Case((9, 8), softcap=1.5, mask="bool", sliding=4, window=4, sinks=0))


@pytest.mark.parametrize(
    "case",
    [
        Case((), mask="none"),
        Case((), mask="bool"),
        Case((), mask="bool", pad=(3,)),
        Case((), mask="none", sliding=40, sinks=0),
        Case((), mask="none", softcap=2.0),
        Case((), mask="none", sink_logits=True),
    ],
)
@pytest.mark.parametrize("before", [0, 5])
def test_memory_grows_with_the_tokens_alone(case: Case, before: int) -> None:
    """The largest tensor of a call of twice as many tokens is twice as large, but for masks that
    come with the call, which are bool."""
    if not before and case.mask == "bool":
        pytest.skip("torch's own fused attention turns the whole mask into numbers")
    sizes = [_largest(case, before, length) for length in (1024, 2048)]
    assert sizes[1] <= 2.1 * sizes[0]


def test_memory_that_grows_with_the_square_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_module, "fits", lambda *_: True)
    sizes = [_largest(Case((), mask="none"), 5, length) for length in (1024, 2048)]
    assert sizes[1] > 3 * sizes[0]


class _Largest(TorchDispatchMode):
    """The most bytes of one tensor that an operator gives; bool ones do not count."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dtype != torch.bool:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def _largest(case: Case, before: int, length: int) -> int:
    generator = torch.Generator().manual_seed(0)
    layer = Layer(case.plan(), 1)
    heads = case.heads * case.groups
    knobs = Knobs(case.scale, case.softcap, torch.zeros(heads) if case.sink_logits else None)
    most = _Largest()
    for number, tokens in enumerate(n for n in (before, length) if n):
        q = torch.randn(1, heads, tokens, 8, generator=generator)
        k, v = torch.randn(2, 1, case.heads, tokens, 8, generator=generator)
        valid = torch.arange(layer.seen, layer.seen + tokens)[None] >= case.pad[0]
        mask = make_mask(
            torch.cat([layer.valid, valid], 1), tokens, kind=case.mask, heads=heads,
            sliding=case.sliding, dtype=case.dtype, generator=generator,
        )  # fmt: skip
        with most if tokens == length else nullcontext():
            layer.step(q, k, v, mask, knobs, valid, fresh=number == 0)
    return most.bytes


@pytest.mark.parametrize("kind", ["bool", "additive", "lowest"])
@pytest.mark.parametrize("lengths", [(6,), (1,), (3, 3), (6, 1)])
def test_a_row_that_sees_nothing_gives_zeros(kind: str, lengths: tuple[int, ...]) -> None:
    """Also if it is the whole sequence, and the rows beside it do not notice."""
    check(Case(lengths, pad=(0, 99, 2), mask=kind))
    check(Case(lengths, pad=(0, 99, 2), mask=kind, sliding=3, window=2, sinks=0))


@pytest.mark.parametrize("length", [1, 4])
def test_empty_slots_get_exactly_no_probability(length: int) -> None:
    """Whatever numbers lie in them."""
    case = Case((), tiers=(("native", 5), ("int8", 5)))
    knobs = Knobs(case.scale)
    outputs = []
    for poison in (False, True):
        generator = torch.Generator().manual_seed(0)
        layer = Layer(case.plan(), 1)
        if poison:
            for segment in layer.state.view().segments:
                for part in (*segment.k, *segment.v):
                    part.fill_(3e4 if part.is_floating_point() else 127)
        for tokens in (3, length):
            q = torch.randn(1, 4, tokens, 8, generator=generator)
            k, v = torch.randn(2, 1, 2, tokens, 8, generator=generator)
            out = layer.step(q, k, v, None, knobs, torch.ones(1, tokens, dtype=torch.bool))
        outputs.append(out)
    assert torch.equal(*outputs)


def test_inputs_that_require_grad_leave_no_graph_behind() -> None:
    layer = Layer(Case(()).plan(), 1)
    q, k, v = (torch.randn(1, h, 3, 8, requires_grad=True) for h in (4, 2, 2))
    out = layer.step(q, k, v, None, Knobs(1.0), torch.ones(1, 3, dtype=torch.bool))
    assert not out.requires_grad
    assert not any(t.requires_grad for t in layer.state.tensors)


# Negative controls: each breaks one thing, and the comparison above must notice.

PLAIN = Case((7, 1, 1, 4, 1), pad=(0, 2))


def _no_update(*_: object) -> None:
    return None


def _tiled(q: Tensor, heads: int) -> Tensor:
    return q.unflatten(1, (q.shape[1] // heads, heads)).transpose(1, 2)


def _swapped(codec: object, fields: list[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
    return fields[0].roll(1, -2).to(dtype)


BROKEN = {
    "prefill forgotten": (PLAIN, "merge_many", _no_update),
    "decoded token forgotten": (PLAIN, "exchange_one", _no_update),
    "query heads tiled": (PLAIN, "group", _tiled),
    "softcap ignored": (replace(PLAIN, softcap=1.0), "cap", lambda x, _: x),
    "sinks ignored": (
        replace(PLAIN, sink_logits=True),
        "softmax",
        lambda x, _, f=attention_module.softmax: f(x, None),
    ),
    "mask of the slots off by one": (
        replace(PLAIN, mask="bool-heads"),
        "gather_mask",
        lambda m, pos, offset, g, f=attention_module.gather_mask: f(m, pos + 1, offset, g),
    ),
    "mask of the new tokens ignored": (PLAIN, "hide", lambda x, _: x),
    "sliding window ignored": (
        replace(PLAIN, sliding=3, window=3, sinks=0, mask="none", pad=(0,)),
        "slot_logits",
        lambda q, s, p, m, o, _, k, f=attention_module.slot_logits, **x: f(
            q, s, p, m, o, 0, k, **x
        ),
    ),
}


def _break(monkeypatch: pytest.MonkeyPatch, attribute: str, replacement: object) -> None:
    """Put ``replacement`` wherever a module calls ``attribute``."""
    for module in (attend_module, attention_module, reference):
        if hasattr(module, attribute):
            monkeypatch.setattr(module, attribute, replacement)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_attention_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, attribute, replacement = BROKEN[name]
    check(case)
    _break(monkeypatch, attribute, replacement)
    with pytest.raises(AssertionError, match="call"):
        check(case)


def test_keys_in_the_wrong_slots_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier that gives back its neighbour's numbers."""
    from arkv_fx.formats.int8 import Int8

    case = Case((12, 1, 1), tiers=(("int8", 6),))
    check(case, over="slots")
    _break(
        monkeypatch,
        "value_sum",
        lambda p, codec, fields, dim, f=attention_module.value_sum, **options: f(
            p,
            codec,
            [x.roll(1, 2) for x in fields] if isinstance(codec, Int8) else fields,
            dim,
            **options,
        ),
    )
    with pytest.raises(AssertionError, match="call"):
        check(case, over="slots")
