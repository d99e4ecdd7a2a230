"""Bytes and slots: what is planned is what is held, and it never grows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from reference_attention import Layer
from torch import Tensor

from arkv_fx import ArkvConfig
from arkv_fx.errors import ConfigError, UnknownOptionError, UnsupportedFormatError
from arkv_fx.formats import FORMATS
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan, Tier, allowance, lifted, plan_layer
from arkv_fx.scores import SCORES
from arkv_fx.state.session import LayerState

SHAPES = {"llama": (3, 64), "large": (8, 128), "mqa": (1, 256)}  # kv heads, head dim
CPU = torch.device("cpu")


def plan(config: ArkvConfig, heads: int = 3, dim: int = 64, **options: Any) -> LayerPlan:
    settings: dict[str, Any] = {"dtype": torch.bfloat16, **options}
    return plan_layer(config, heads=heads, k_dim=dim, v_dim=dim, **settings)


def measured(state: LayerState) -> int:
    """Bytes of storage, whatever the tensors' shapes claim."""
    return sum(t.untyped_storage().nbytes() for t in state.tensors)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_bytes_are_the_tensors_bytes(name: str, score: str, dtype: torch.dtype) -> None:
    for tiers in ((Tier(name, 5),), (Tier("native", 3), Tier(name, 0)), (Tier(name, 2),) * 2):
        window = "bf16" if len(tiers) == 1 else "native"
        layer = LayerPlan(2, 16, 32, dtype, 4, 1, 0, tiers, score, window_format=window)
        for batch in (1, 3):
            state = LayerState(layer, batch, CPU)
            assert layer.nbytes(batch) == measured(state) == state.nbytes()
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.tensors)


def test_bytes_counted_by_hand() -> None:
    """int8 + int4, the mass score, in bfloat16: everything that a slot costs."""
    layer = LayerPlan(
        2, 64, 32, torch.bfloat16, 4, 1, 0, (Tier("int8", 10), Tier("int4", 6)), "mass"
    )
    slot = 4 + 2  # position, mass in half precision
    ring = 5 * (2 * (64 + 32) + slot)
    int8 = 10 * (64 + 2 + 32 + 2 + slot)  # codes and a bfloat16 scale each
    int4 = 6 * (32 + 3 + 16 + 3 + slot)  # half the codes, scale and zero
    centre = 64 * 4
    assert layer.nbytes() == 2 * (ring + int8 + int4 + centre) + 3 * 4  # count, seen, bad


@pytest.mark.parametrize(("short", "size"), [(True, 5), (False, 7)])
def test_bookkeeping_of_a_slot(short: bool, size: int) -> None:
    """Position, mass and novelty: two bytes, two and one, or four for positions of any number."""
    tiers = (Tier("native", 1000),)
    held = LayerPlan(2, 64, 64, torch.bfloat16, 4, 1, 0, tiers, "combined", short_positions=short)
    more = replace(held, tiers=(Tier("native", 1001),))
    for batch in (1, 3):
        states = [LayerState(each, batch, CPU) for each in (held, more)]
        one, two = map(measured, states)
        assert two - one == batch * 2 * (size + 2 * 64 * 2)
        assert [held.nbytes(batch), more.nbytes(batch)] == [one, two]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiers", [("int8", "int4"), ("native", "fp8"), ("native",), ("k8v4",)])
@pytest.mark.parametrize("compression", [4.0, 2.0, 8.0])
def test_a_quarter_of_the_bytes_is_a_quarter(
    shape: str, tiers: tuple[str, ...], compression: float
) -> None:
    heads, dim = SHAPES[shape]
    config = ArkvConfig(compression=compression, context=4096, tiers=tiers)
    full = 4096 * heads * 2 * dim * 2  # tokens, heads, keys and values, bytes of a bfloat16
    layer = plan(config, heads, dim)
    assert layer.full_nbytes(4096) == full
    held = measured(LayerState(layer, 1, CPU))
    assert held <= full / compression, "more than was asked for"
    assert held >= 0.98 * full / compression, "room wasted"
    assert measured(LayerState(layer, 2, CPU)) == 2 * held


def test_smaller_formats_hold_more_tokens() -> None:
    slots = [plan(ArkvConfig(tiers=(name,))).slots for name in ("native", "int8", "k8v4", "int4")]
    assert slots == sorted(slots)
    assert 950 < slots[0] < 1024 and slots[1] > 1.8 * slots[0] and slots[3] > 2.8 * slots[0]


@given(
    size=st.integers(1, 40),
    ratio=st.floats(0, 1),
    round_to=st.sampled_from((1, 8, 64)),
    heads=st.integers(1, 4),
    tiers=st.sampled_from((("int8", "int4"), ("native", "fp8"), ("int8",))),
    sliding=st.sampled_from((0, 0, 1, 16, 300)),
    score=st.sampled_from(list(SCORES)),
)
def test_any_byte_budget_is_kept(
    size: int, ratio: float, round_to: int, heads: int, tiers: tuple[str, ...], sliding: int,
    score: str,
) -> None:  # fmt: skip
    allowed = size * heads * 2500
    config = ArkvConfig(bytes=allowed, tiers=tiers, round_to=round_to, score=score)
    layer = plan(config, heads, 32, sliding=sliding, oq_ratio=ratio)
    bare = ArkvConfig(budget=36, score=score, tiers=tiers)
    if not sliding and allowed < plan(bare, heads, 32).nbytes():
        assert layer == replace(plan(bare, heads, 32), tiers=tuple(Tier(t, 0) for t in tiers))
        return
    counts = [t.slots for t in layer.tiers]
    if sliding:
        assert layer.slots <= sliding and layer.sinks == 0
        whole = layer.window == sliding and not sum(counts)
        assert layer.nbytes() <= allowed or whole, "a short window may be kept whole"
    else:
        assert layer.nbytes() <= allowed
        assert all(n % round_to == 0 for n in counts)
        one_more = replace(layer.tiers[-1], slots=counts[-1] + round_to)
        bigger = replace(layer, tiers=(*layer.tiers[:-1], one_more))
        assert bigger.nbytes() > allowed, "room wasted"


@pytest.mark.parametrize("window", [1, 16, 100, 5000])
@pytest.mark.parametrize(
    "config",
    [ArkvConfig(), ArkvConfig(budget=64), ArkvConfig(budget=4096), ArkvConfig(bytes=2**20),
     ArkvConfig.paper(512)],
)  # fmt: skip
def test_a_sliding_layer_never_plans_more_than_its_window(window: int, config: ArkvConfig) -> None:
    layer = plan(config, sliding=window)
    assert layer.slots <= window and layer.sinks == 0 and layer.window >= 1
    if config.budget is not None:
        assert layer.slots == min(config.budget, window)


@given(budget=st.integers(36, 3000), ratio=st.floats(0, 1))
def test_the_papers_rule(budget: int, ratio: float) -> None:
    """Originals = ratio * (budget - W), Quantized the rest, in tokens."""
    layer = plan(ArkvConfig.paper(budget), oq_ratio=ratio)
    originals, quantized = (t.slots for t in layer.tiers)
    assert [t.format for t in layer.tiers] == ["native", "fp8"]
    assert originals == round(ratio * (budget - 32))
    assert layer.window + originals + quantized == layer.slots == budget


def test_a_layers_ratio_is_a_share_of_bytes_under_a_byte_budget() -> None:
    layers = [plan(ArkvConfig(), oq_ratio=ratio) for ratio in (0.0, 0.3, 1.0)]
    assert layers[0].tiers[0].slots == 0
    assert layers[2].tiers[1].slots <= 8
    assert layers[0].slots > layers[1].slots > layers[2].slots, "cheaper slots buy more tokens"
    assert plan(ArkvConfig(oq_ratio=0.3)) == layers[1]


@pytest.mark.parametrize(
    "config",
    [ArkvConfig(bytes=1), ArkvConfig(compression=1e300), ArkvConfig(compression=4, context=1)],
)
def test_a_budget_below_window_and_sinks_leaves_them_alone(config: ArkvConfig) -> None:
    layer = plan(config)
    assert (layer.ring, layer.slots) == (36, 36) and layer.nbytes() > allowance(config, layer)
    assert plan(config, sliding=20).slots == 20, "a window that is short is kept whole"


shares_of_layers = st.lists(st.floats(0.01, 3), min_size=1, max_size=8)


@given(shares=shares_of_layers, least=st.floats(0, 3))
def test_layers_below_the_least_are_lifted_and_the_others_give(
    shares: list[float], least: float
) -> None:
    after = [lifted(share, shares, least) for share in shares]
    assert min(after) >= least or after == shares
    order = sorted(range(len(shares)), key=lambda i: shares[i])
    assert [after[i] for i in order] == sorted(after), "who had more has no less than others"
    if sum(shares) >= least * len(shares):
        assert sum(after) == pytest.approx(sum(shares)), "no more and no less than was there"
        assert all(b <= max(a, least) + 1e-9 for a, b in zip(shares, after, strict=True))
    else:
        assert after == [least] * len(shares), "all have the least, whatever they had"


@given(
    shares=shares_of_layers,
    size=st.integers(5_000, 100_000),
    budget=st.sampled_from(("bytes", "budget", "compression")),
)
def test_calibrated_layers_keep_to_the_sum_of_their_budgets(
    shares: list[float], size: int, budget: str
) -> None:
    """However tight: what window and sinks need is taken from the layers that have more."""
    shares = [share * len(shares) / sum(shares) for share in shares]  # as a calibration has them
    options = {"bytes": {"bytes": size}, "budget": {"budget": max(36, size // 100)}}
    config = ArkvConfig(**options.get(budget, {"compression": 3, "context": 36 + size // 100}))  # type: ignore[arg-type]
    layers = [plan(config, 1, share=share, shares=shares) for share in shares]
    given = allowance(config, layers[0]) * len(shares)
    if budget == "budget":
        held, least = sum(layer.slots for layer in layers), 36
        given += len(shares)  # each is rounded to whole tokens
    else:
        held = sum(layer.nbytes() for layer in layers)
        least = plan(ArkvConfig(bytes=1), 1).nbytes()
    assert all(layer.slots >= 36 for layer in layers)
    assert held <= given or held == least * len(shares)


def test_a_tight_share_without_the_others_is_not_kept() -> None:
    """Negative control: the sum is exceeded where layers do not know of each other."""
    config, shares = ArkvConfig(budget=50), (0.5, 1.5)
    alone = [plan(config, share=share).slots for share in shares]
    together = [plan(config, share=share, shares=shares).slots for share in shares]
    assert (sum(alone), sum(together)) == (36 + 75, 100)


def test_plans_go_through_json() -> None:
    layer = plan(ArkvConfig(score="paper", score_options=(("kernel", 3),)), sliding=512)
    assert LayerPlan.parse(layer.to_json()) == layer
    assert LayerPlan.parse(layer.to_json()).policy().kernel == 3  # type: ignore[attr-defined]


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(ConfigError, match=r"budget=20: must be at least window \+ sinks = 36"):
        plan(ArkvConfig(budget=20))
    with pytest.raises(UnsupportedFormatError, match=r"'int4', keys: .* 63 elements"):
        plan(ArkvConfig(tiers=("int8", "int4")), dim=63)
    for options in ({"tiers": ("int9",)}, {"score": "luck"}):
        with pytest.raises(UnknownOptionError, match="unknown"):
            plan(ArkvConfig(**options))  # type: ignore[arg-type]


# While decoding


def new_tokens(layer: Layer, length: int) -> list[Tensor]:
    heads = layer.plan.heads
    return [torch.randn(layer.batch, h, length, 16) for h in (2 * heads, heads, heads)]


def step(layer: Layer, length: int = 1) -> None:
    valid = torch.ones(layer.batch, length, dtype=torch.bool)
    layer.step(*new_tokens(layer, length), None, Knobs(0.25), valid)


def test_nothing_grows_and_nothing_moves_while_decoding() -> None:
    layer = Layer(plan(ArkvConfig(budget=64), 2, 16, dtype=torch.float32), batch=2)
    step(layer, 40)
    held = [(t.data_ptr(), t.shape) for t in layer.state.tensors]
    size = measured(layer.state)
    for _ in range(300):
        step(layer)
    assert [(t.data_ptr(), t.shape) for t in layer.state.tensors] == held
    assert measured(layer.state) == layer.plan.nbytes(2) == size
    assert layer.state.view().count.tolist() == [340, 340]
    for segment in layer.state.view().segments:
        assert (segment.pos >= 0).all(), "all slots are in use"


@given(
    compression=st.floats(1.2, 6), context=st.sampled_from([700, 4096]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), sliding=st.sampled_from([0, 512]),
)  # fmt: skip
def test_what_the_context_leaves_over_buys_precision(
    compression: float, context: int, dtype: torch.dtype, sliding: int
) -> None:
    """No calibration says more: no slot stays empty while a token sits in a worse format."""
    config = ArkvConfig(compression=compression, context=context)
    found = plan(config, dtype=dtype, sliding=sliding)
    size = plan(config.replace(tiers=("k4v3",)), dtype=dtype, sliding=sliding)
    tokens = sliding or context
    quantized = found.tiers[1].slots
    if size.slots < tokens:  # nothing to spare even in the smallest format
        assert found == plan(config, dtype=dtype, sliding=sliding, oq_ratio=config.oq_ratio)
        return
    assert found.slots >= tokens - config.round_to
    if quantized > config.round_to:  # a few more Originals, and some token would have no slot
        assert found.slots < tokens + 3 * config.round_to
    assert found.nbytes() <= allowance(config, found)
    best = plan(config.replace(tiers=("k8v4",)), dtype=dtype, sliding=sliding)
    if abs(best.slots - tokens) > 3 * config.round_to:
        assert (quantized <= config.round_to) == (best.slots >= tokens)


def test_at_twice_the_compression_of_16_bits_all_are_in_the_better_format() -> None:
    """Where the untouched ratio left a third of the bytes to slots that never fill."""
    found = plan(ArkvConfig(), dtype=torch.float32)
    originals, quantized = (tier.slots for tier in found.tiers)
    assert originals > 4096 and quantized <= 8
    assert [tier.slots > 0 for tier in plan(ArkvConfig()).tiers] == [True, True]
