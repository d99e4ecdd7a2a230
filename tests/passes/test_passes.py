"""The passes on small graphs: what each rewrites, and what each leaves alone and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from arkv_fx.passes import carry, heads, pipeline, rewrite
from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.nodes import op_name
from arkv_fx.passes.sites import Cache
from pass_harness import (
    DIM,
    GROUPS,
    HEADS,
    ROOMY,
    Function,
    Rewritten,
    apply,
    cached,
    capture,
    check_output,
    flattened,
    interleaved,
    interleaved_function,
    lift,
    repeated,
    session,
    tensors,
    tiled,
    transposed,
    unsqueezed,
)  # fmt: skip
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import arkv_fx.ops.schema  # noqa: F401  (registers the marker)
from arkv_fx import ArkvConfig, Calibration
from arkv_fx.calibration import LayerStatistics
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.errors import PassError, UnsupportedFormatError
from arkv_fx.report import Report


def doubled(x: Tensor) -> Tensor:
    return interleaved(x) * 2


def reversed_heads(x: Tensor) -> Tensor:
    return interleaved(x.flip(1))


# find_sdpa, fuse_marker, rewrite


def test_a_marker_and_its_attention_become_one_operator() -> None:
    q, k, v = tensors(6)
    out = capture(cached(lift), q, k, v)
    assert out.reasons == [""]
    assert out.count("scaled_dot_product_attention") == (1, 0)
    assert out.count("kv_update") == (1, 0)
    assert out.count("expand") == (2, 0), "the peeled expansion is dead and must go"
    assert out.count("attend") == (0, 1)
    (site,), (planned,) = out.context.sites, out.context.fused
    assert (site.source, site.layer) == ("marker", 0)
    assert (planned.cache.fresh, planned.heads) == (True, HEADS)
    # The state comes behind the graph's own inputs, in the plan's order, for this one site.
    inputs = [[n.name for n in g.graph.nodes if n.op == "placeholder"]
              for g in (out.before, out.after)]  # fmt: skip
    assert inputs[1][: len(inputs[0])] == inputs[0]
    assert len(inputs[1]) - len(inputs[0]) == len(planned.plan.specs())
    attend = next(n for n in out.after.graph.nodes if op_name(n) == "attend")
    assert [n.name for n in attend.args[4]] == inputs[1][len(inputs[0]) :]
    assert attend.args[6] == pytest.approx(1 / math.sqrt(DIM))


def aten(*args: Any, **kwargs: Any) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention.default(*args, **kwargs)


@pytest.mark.parametrize(
    "attention",
    [F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention, aten],
    ids=["functional", "builtin", "aten"],
)
def test_every_spelling_of_attention_is_found(attention: Function) -> None:
    backend = check_output(cached(lift, attention))
    assert all(s.fused for sites in backend.sites for s in sites)


def test_graphs_of_make_fx_are_read_too() -> None:
    """aten overloads, values under "val", everything by position."""
    q, k, v = tensors(6)
    handle = session().handle
    graph = make_fx(cached(lift), tracing_mode="fake", pre_dispatch=True)(q, k, v, handle, 6)
    context = Context(ROOMY)
    after = pipeline.apply(graph, context)
    assert [s.reason for s in context.sites] == [""]
    assert [op_name(n) for n in after.graph.nodes if op_name(n)] == ["attend"]


@pytest.mark.parametrize("scale", [None, 0.5, 2])
def test_the_scale_is_kept(scale: float | None) -> None:
    check_output(cached(lift, scale=scale))


# peel_gqa


@pytest.mark.parametrize(
    "expand",
    [lift, unsqueezed, flattened, interleaved, interleaved_function, repeated, tiled, transposed],
    ids=lambda f: f.__name__,
)
def test_an_expansion_of_kv_heads_is_looked_through(expand: Callable[[Tensor], Tensor]) -> None:
    backend = check_output(cached(expand))
    assert [s.reason for sites in backend.sites for s in sites] == [""] * len(backend.sites)
    assert {s.planned.heads for sites in backend.sites for s in sites} == {HEADS}


def test_grouped_attention_needs_no_peeling() -> None:
    backend = check_output(cached(enable_gqa=True))
    assert all(s.fused for sites in backend.sites for s in sites)


def test_what_is_not_known_is_refused_and_stays_right() -> None:
    backend = check_output(cached(reversed_heads))
    reasons = {s.reason for sites in backend.sites for s in sites}
    assert len(reasons) == 1 and reasons != {""}
    assert not any(r.startswith("no cache") for r in reasons), "it has one"


def test_keys_and_values_may_pair_heads_differently() -> None:
    backend = check_output(cached(lift, expand_values=repeated))
    assert all(s.fused and s.cache.computed for sites in backend.sites for s in sites)


def test_keys_and_values_must_have_the_same_heads() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
        keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
        return F.scaled_dot_product_attention(q, keys[:, :1], values, is_causal=q.shape[2] > 1)

    (site,) = check_output(function, HEADS).sites[0]
    assert "differ in how batch and heads are laid out" in site.reason


def test_an_expansion_that_pairs_the_wrong_heads_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: look through tiling as if it were the same."""
    monkeypatch.setattr(heads, "_plain", lambda layout: True)
    with pytest.raises(AssertionError, match="not close"):
        check_output(cached(tiled))


def test_keys_and_values_may_be_computed_from_the_cache() -> None:
    """Token by token: latents of multi-head latent attention, or simply twice the numbers."""
    weight = torch.randn(2 * HEADS * GROUPS * DIM, HEADS * DIM)

    def latent(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
        keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
        b, _, s, _ = keys.shape
        both = F.linear(keys.transpose(1, 2).reshape(b, s, -1), weight)
        split = both.view(b, s, HEADS * GROUPS, 2 * DIM).transpose(1, 2).split([DIM, DIM], -1)
        heads = keys.new_empty(b, HEADS * GROUPS, s, DIM)
        heads[..., :4].copy_(split[0][..., :4])
        heads[..., 4:].copy_(lift(values)[..., 4:])
        return F.scaled_dot_product_attention(q, heads, split[1], is_causal=q.shape[2] > 1)

    for function in (latent, cached(doubled)):
        backend = check_output(function)
        assert all(s.fused and s.cache.computed for sites in backend.sites for s in sites)


def test_a_computation_that_is_not_copied_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "replay", lambda site, columns, emit: columns)
    with pytest.raises(AssertionError, match="not close"):
        check_output(cached(lambda x: x * 2), HEADS)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x.flip(2),
        lambda x: x.cumsum(2),
        lambda x: x - x.mean(2, keepdim=True),
        lambda x: x + torch.arange(x.shape[2])[:, None],
        lambda x: x.transpose(1, 2).reshape(x.shape),
    ],
)
def test_a_computation_that_mixes_tokens_is_refused(mix: Callable[[Tensor], Tensor]) -> None:
    backend = check_output(cached(mix), HEADS)
    assert all("tokens" in s.reason for sites in backend.sites for s in sites)


def test_changed_dtypes_are_no_views() -> None:
    def half(x: Tensor) -> Tensor:
        return interleaved(x.to(torch.bfloat16))

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q.bfloat16(), k, v, **options)

    (site,) = capture(cached(half, attention), *tensors(6)).context.sites
    assert site.fused and site.cache.computed


# What is left alone, and why


def test_outputs_may_be_swapped() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
        keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
        return F.scaled_dot_product_attention(q, values, keys, is_causal=q.shape[2] > 1)

    (site,) = check_output(function, HEADS).sites[0]
    assert site.fused and site.cache.computed


def both_attend(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
    keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
    causal = q.shape[2] > 1
    first = F.scaled_dot_product_attention(q, keys, values, is_causal=causal)
    return first + F.scaled_dot_product_attention(q * 2, keys, values, is_causal=causal)


def also_sums(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
    keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=q.shape[2] > 1) + keys.sum()


def also_returns(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Any:
    keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=q.shape[2] > 1), keys[:, :, -1]


def test_two_attentions_may_read_one_cache() -> None:
    backend = check_output(both_attend, HEADS)
    assert all(first.fused and second.fused for first, second in backend.sites)
    assert all(not first.cache.last and second.cache.last for first, second in backend.sites)


def last_looks(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
    """Behind a layer that shares its cache, only the newest token asks: Gemma 4's prefill."""
    keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
    assert q.shape[2] == k.shape[2]  # a guard, as in a model that computes both of one tensor
    shown = torch.arange(total) <= torch.arange(total - q.shape[2], total)[:, None]
    first = F.scaled_dot_product_attention(q, keys, values, shown)
    asking = q[:, :, -1:] * 2
    second = F.scaled_dot_product_attention(asking, keys, values)
    masked = F.scaled_dot_product_attention(q[:, :, -2:] * 3, keys, values, shown[-2:])
    return torch.cat([first, second, masked], 2)


@pytest.mark.parametrize("steps", [(6, 1, 1), (6, 4, 1, 3, 1)])
def test_some_tokens_may_ask_behind_all(steps: tuple[int, ...]) -> None:
    backend = check_output(last_looks, HEADS, steps)
    assert all(site.fused for sites in backend.sites for site in sites)
    first, *others = backend.sites[0]
    assert first.cache.last and first.cache.behind is others[-1].node


def test_an_update_before_the_last_look_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "behind", property(lambda self: None, lambda self, value: None))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="instead of once, at last"):
        check_output(last_looks, HEADS)


def some_ask(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
    keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
    return F.scaled_dot_product_attention(q[:, :, -1:], keys, values)


def test_some_tokens_alone_are_left_alone() -> None:
    backend = check_output(some_ask, HEADS)
    assert all("1 queries for" in site.reason for site in backend.sites[0])


def test_an_update_by_each_of_two_attentions_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "last", property(lambda self: True, lambda self, value: None))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="updated 2 times"):
        check_output(both_attend, HEADS)


@pytest.mark.parametrize("function", [also_sums, also_returns])
def test_a_cache_with_another_reader_is_left_alone(function: Function) -> None:
    backend = check_output(function, HEADS)
    assert all("is also read by" in s.reason for sites in backend.sites for s in sites)


def test_attention_behind_a_cached_one_has_its_own_reason() -> None:
    """Cross-attention: its keys come from elsewhere, though its queries have seen a cache."""
    encoded = torch.randn(1, HEADS, 4, DIM)

    def function(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
        x = cached(lift)(q, k, v, handle, total)
        y = x @ torch.ones(DIM, DIM)
        x = F.scaled_dot_product_attention(y, lift(encoded), lift(encoded))
        return F.scaled_dot_product_attention(x, y, y)

    backend = check_output(function)
    for first, cross, uncached in backend.sites:
        assert first.fused
        assert cross.reason.startswith("no cache") and uncached.reason.startswith("no cache")


def test_a_size_is_no_reader() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
        keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=q.shape[2] > 1)
        return out * keys.shape[2]

    assert all(s.fused for sites in check_output(function, HEADS).sites for s in sites)


def test_bidirectional_attention_over_a_cache_is_left_alone() -> None:
    backend = check_output(cached(lift, is_causal=False))
    prompt, *steps = (sites[0] for sites in backend.sites)
    assert "bidirectional" in prompt.reason
    # One token sees all before it either way, but what it sees was kept as it is.
    assert steps and all(site.reason for site in steps)


def test_a_mask_over_keys_only_holds_for_all_queries() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
        keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
        mask = (torch.arange(keys.shape[2]) > 1)[None, None, None, :]
        return F.scaled_dot_product_attention(q, lift(keys), lift(values), attn_mask=mask)

    backend = check_output(function)
    assert all(site.fused for sites in backend.sites for site in sites)


def test_dropout_a_computed_scale_and_odd_shapes_are_refused() -> None:
    def run(function: Function, *args: Any) -> str:
        (reason,) = capture(function, *args).reasons
        return reason

    q, k, v = tensors(6)
    assert "dropout is on: call model.eval" in run(cached(lift, dropout_p=0.1), q, k, v)
    queries_only = torch.ones(1, 1, 6, 1, dtype=torch.bool)
    broadcast = run(cached(lift, attn_mask=queries_only, is_causal=False), q, k, v)
    assert "mask has shape [1, 1, 6, 1], which is not [1, 6, 6, 6]" in broadcast

    def two(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
        return F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0])

    assert "query has shape (6, 8), not" in run(two, *tensors(6, HEADS))


def test_a_mask_over_many_new_tokens_is_kept() -> None:
    """Prefix attention: the prompt sees itself in both directions, by its mask."""
    q, k, v = tensors(6)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 4:] = torch.ones(6, 2).tril(-4).bool()
    function = cached(lift, attn_mask=mask, is_causal=False)
    out = capture(function, q, k, v)
    assert out.reasons == [""]
    compiled = torch.compile(function, backend=ArkvBackend(ROOMY, compile="eager"))
    ours, plain = session(), session()
    expected = function(q, k, v, plain.handle, 6)
    torch.testing.assert_close(compiled(q, k, v, ours.handle, 6), expected)


class Block(nn.Module):
    """Self-attention, optionally over another sequence, and a feed-forward layer."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.causal = causal

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q = self.qkv(x)[..., :24].unflatten(-1, (3, 8)).transpose(1, 2)
        source = x if other is None else other
        k, v = (y.unflatten(-1, (3, 8)).transpose(1, 2)
                for y in self.qkv(source)[..., 24:].chunk(2, -1))  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return x + F.gelu(self.out(y.transpose(1, 2).flatten(2)))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.token, self.blocks = (
            nn.Parameter(torch.randn(1, 1, 24)),
            nn.Sequential(Block(), Block()),
        )

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(image), -1, -1), patches], 1)
        y: Tensor = self.blocks(x)[:, 0]
        return y


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(20, 24), Block()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.block(self.embed(ids), mask=mask[:, None, None, :])
        return y


class Translator(nn.Module):
    """Cross-attention, and causal self-attention without a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.self_block, self.cross_block = Block(causal=True), Block()

    def forward(self, x: Tensor, encoded: Tensor) -> Tensor:
        y: Tensor = self.cross_block(self.self_block(x), encoded)
        return y


@pytest.mark.parametrize(
    ("model", "inputs", "sites"),
    [
        (Vit, (torch.randn(2, 3, 8, 8),), 2),
        (Bert, (torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 0], [1] * 4]).bool()), 1),
        (Translator, (torch.randn(1, 5, 24), torch.randn(1, 7, 24)), 2),
    ],
)
def test_models_without_a_cache_are_untouched(
    model: type[nn.Module], inputs: tuple[Tensor, ...], sites: int
) -> None:
    torch.manual_seed(0)
    net = model().eval()
    with torch.no_grad():
        out = apply(net, *inputs)
        assert len(out.reasons) == sites
        assert all(reason.startswith("no cache") or "mask" in reason for reason in out.reasons)
        assert out.after.code == out.before.code
        backend = ArkvBackend(ROOMY, compile="eager")
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(net, backend=backend)(*inputs), net(*inputs))
    rows = Report.of(backend.sites, ROOMY)
    assert rows.fused == 0 and rows.nbytes == 0
    assert str(rows).count("  not ") == sites


# absorb_cat


def concatenating(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], -2)
    out = F.scaled_dot_product_attention(q, lift(keys), lift(values), is_causal=q.shape[2] > 1)
    return out, keys, values


def check_past(function: Function, steps: tuple[int, ...] = (6, 1, 1, 1)) -> ArkvBackend:
    """As check_output, for functions that take a past and return a new one behind their result."""
    torch._dynamo.reset()
    backend = ArkvBackend(ROOMY, compile="eager")
    compiled = torch.compile(function, backend=backend)
    ours = plain = [torch.zeros(1, HEADS, 0, DIM) for _ in range(2)]
    for step, length in enumerate(steps):
        inputs = tensors(length, seed=step)
        out, *ours = compiled(*inputs, *ours)
        expected, *plain = function(*inputs, *plain)
        torch.testing.assert_close(out, expected)
        assert [x.shape for x in ours] == [x.shape for x in plain]
    backend.last = ours  # type: ignore[attr-defined]
    return backend


def test_a_cat_of_past_and_new_is_absorbed() -> None:
    backend = check_past(concatenating)
    assert all(s.fused and s.source == "cat" for sites in backend.sites for s in sites)
    for x in backend.last:  # type: ignore[attr-defined]
        assert x.untyped_storage().nbytes() == x.dtype.itemsize, "the past still takes memory"


def test_absorption_leaves_no_cat_behind() -> None:
    past = [torch.zeros(1, HEADS, 0, DIM) for _ in range(2)]
    out = apply(concatenating, *tensors(6), *past)
    assert out.count("cat") == (2, 0) and out.count("attend") == (0, 1)
    assert out.context.sites[0].cache.fresh


def reads_joined(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    out, keys, values = concatenating(q, k, v, past_k, past_v)
    return out + keys.mean(), keys, values


def reads_a_view(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    out, keys, values = concatenating(q, k, v, past_k, past_v)
    return out + values[:, :, 0].unsqueeze(2).mean(), keys, values


def reads_past(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    out, keys, values = concatenating(q, k, v, past_k, past_v)
    return out + past_k.sum(), keys, values


def attends_twice(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    out, keys, values = concatenating(q, k, v, past_k, past_v)
    return out + F.scaled_dot_product_attention(q, lift(keys), lift(values)), keys, values


@pytest.mark.parametrize("function", [reads_joined, reads_a_view, reads_past, attends_twice])
def test_a_past_with_another_reader_is_not_absorbed(function: Function) -> None:
    backend = check_past(function)
    assert not any(s.fused for sites in backend.sites for s in sites)
    assert "also read by" in backend.sites[-1][0].reason


def only_keys(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    keys, values = torch.cat([past_k, k], 2), torch.stack([*past_v.unbind(2), *v.unbind(2)], 2)
    out = F.scaled_dot_product_attention(q, lift(keys), lift(values), is_causal=q.shape[2] > 1)
    return out, keys, values


def computed_past(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    return concatenating(q, k, v, past_k * 1.0, past_v * 1.0)


@pytest.mark.parametrize("function", [only_keys, computed_past])
def test_half_a_past_or_a_changed_one_is_not_absorbed(function: Function) -> None:
    backend = check_past(function)
    assert not any(s.fused for sites in backend.sites for s in sites)


def test_a_past_that_is_forgotten_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: every step starts afresh."""
    from arkv_fx.state.anchors import Anchors

    monkeypatch.setattr(
        Anchors,
        "state",
        lambda self, past, plan, batch, device, *_: self._start(plan, batch, device),
    )
    monkeypatch.setattr(Anchors, "refuse_strangers", lambda *_: None)
    with pytest.raises(AssertionError, match="not close"):
        check_past(concatenating)


# classify: what a plan is made of


def test_a_call_with_gradients_does_not_switch_compression_off() -> None:
    """Scoring or a training step comes first, generation after it."""
    torch._dynamo.reset()
    backend = ArkvBackend(ROOMY, compile="eager")
    compiled = torch.compile(concatenating, backend=backend)
    past = [torch.zeros(1, HEADS, 0, DIM) for _ in range(2)]
    q, k, v = tensors(6)
    with torch.enable_grad():
        compiled(q.requires_grad_(), k, v, *past)[0].sum().backward()
    assert q.grad is not None and "gradients" in backend.sites[0][0].reason
    with torch.no_grad():
        compiled(*tensors(6), *past)
    assert backend.sites[-1][0].fused


def test_windows_and_ratios_reach_the_plan() -> None:
    q, k, v = tensors(6)
    rows = tuple(LayerStatistics(i, 1.0, 1.0, 1.0, 1.0, r) for i, r in enumerate((0.25, 1.0)))
    calibration = Calibration("x", "paper", (1.0, 1.0, 1.0), (8,), rows)
    config = ArkvConfig(budget=36 + 16, tiers=("native", "int8"))
    out = capture(cached(lift), q, k, v, config=config, calibration=calibration)
    plan = out.context.fused[0].plan
    assert [t.slots for t in plan.tiers] == [4, 12]
    out = capture(cached(lift), q, k, v, config=config, sliding=(16,))
    plan = out.context.fused[0].plan
    assert (plan.sliding, plan.sinks, plan.slots) == (16, 0, 16)


def test_a_format_that_cannot_hold_the_heads_is_named() -> None:
    q, k, v = (x[..., :7] for x in tensors(6))
    context = Context(ArkvConfig(budget=64, tiers=("int4",)))
    graph = make_fx(cached(lift), tracing_mode="fake", pre_dispatch=True)(
        q, k, v, session().handle, 6
    )
    with pytest.raises(UnsupportedFormatError, match="'int4', keys"):
        pipeline.apply(graph, context)


# The graph that came in, and the graph that goes out


def test_the_tracer_s_graph_is_not_changed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
            y: Tensor = self.linear(cached(lift)(q, k, v, handle, total))
            return y

    seen: list[tuple[str, str, int]] = []

    def state(graph: GraphModule) -> tuple[str, str, int]:
        return graph.code, str(graph.graph), len(list(graph.parameters()))

    def backend(graph: GraphModule, _: Any) -> Function:
        before = state(graph)
        after = pipeline.apply(graph, Context(ROOMY))
        assert after is not graph and after.code != graph.code
        assert {id(p) for p in after.parameters()} == {id(p) for p in graph.parameters()}
        assert state(graph) == before
        seen.append(before)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        owner = session()
        torch.compile(Model(), backend=backend)(*tensors(6), owner.handle, 6)
    assert len(seen) == 1


def sabotaged(monkeypatch: pytest.MonkeyPatch, sabotage: Callable[..., None]) -> Rewritten:
    """The passes with one that breaks the graph before it is verified."""
    passes = list(pipeline.PASSES)
    passes.insert(-1, Pass("sabotage", lambda *given: sabotage(*given) or 0))
    monkeypatch.setattr(pipeline, "PASSES", tuple(passes))
    return capture(cached(lift), *tensors(6))


def _attend_of(graph: GraphModule) -> Any:
    return next(n for n in graph.graph.nodes if op_name(n) == "attend")


def _twice(graph: GraphModule, context: Context) -> None:
    node = _attend_of(graph)
    with graph.graph.inserting_after(node):
        graph.graph.call_function(node.target, node.args)


def _other_reader(graph: GraphModule, context: Context) -> None:
    with graph.graph.inserting_after(_attend_of(graph)):
        graph.graph.call_method("clone", (context.state_inputs[0][0],))


def _marker_stays(graph: GraphModule, context: Context) -> None:
    cache = context.sites[0].cache
    with graph.graph.inserting_before(_attend_of(graph)):
        graph.graph.call_function(
            torch.ops.arkv.kv_update, (cache.new_k, cache.new_v, cache.handle, 0, 6)
        )


def _cycle(graph: GraphModule, context: Context) -> None:
    attend = _attend_of(graph)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    with graph.graph.inserting_before(output):
        late = graph.graph.call_method("clone", (attend.args[0],))
    attend.args = (late, *attend.args[1:])


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (_twice, "1 operators were planned but 2 attend"),
        (_other_reader, "has another reader"),
        (_marker_stays, "layer 0 has both a fused attention and a cache update"),
        (_cycle, "used before it has been defined"),
    ],
)
def test_a_broken_graph_does_not_pass(
    sabotage: Callable[..., None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as caught:
        sabotaged(monkeypatch, sabotage)
    if "defined" not in message:
        assert isinstance(caught.value.inner_exception, PassError)


def test_a_rewrite_that_does_nothing_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = tuple(p for p in pipeline.PASSES if p is not rewrite.PASS)
    monkeypatch.setattr(pipeline, "PASSES", passes)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="but 0 attend"):
        capture(cached(lift), *tensors(6))
