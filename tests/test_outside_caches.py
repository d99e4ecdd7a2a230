"""Models written without transformers that keep a cache of their own: it is absorbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models_outside import gpt_fast, x_transformers
from models_outside.sample import ROOMY, TOLERANCE, TOTAL, ids, random_weights
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from arkv_fx import ArkvConfig, transform
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.errors import AbsorbedCacheError

LENGTHS = [20, 5, *[1] * 15]


@pytest.fixture(autouse=True)
def no_graphs_of_the_last_test() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# Static buffers


def fast(batch: int, flex: bool = False) -> nn.Module:
    model = random_weights(gpt_fast.Transformer(gpt_fast.ModelArgs(flex=flex)))
    model.setup_caches(batch, 64)
    return model


def feed(call: Callable[..., Tensor], tokens: Tensor, lengths: list[int] = LENGTHS) -> Tensor:
    """Logits of all tokens, given bit by bit with their positions."""
    out, seen = [], 0
    for length in lengths:
        position = torch.arange(seen, seen + length)
        out.append(call(tokens[:, seen : seen + length].contiguous(), position))
        seen += length
    return torch.cat(out, 1)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("batch", "flex"), [(1, False), (2, False), (1, True)])
def test_gpt_fast(batch: int, flex: bool, lowering: str) -> None:
    full = feed(fast(batch), ids(batch), [TOTAL])
    model = fast(batch, flex)
    for layer in model.layers:  # whoever reads the buffers now reads nonsense
        layer.attention.kv_cache.k_cache.fill_(1e6)
        layer.attention.kv_cache.v_cache.fill_(1e6)
    backend = ArkvBackend(ROOMY, compile=lowering)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):  # the second sequence starts fresh
        assert relative(feed(compiled, ids(batch)), full) <= TOLERANCE
    assert all(site.fused for sites in backend.sites for site in sites)
    cache = model.layers[0].attention.kv_cache.k_cache
    assert cache[:, :, 0].isnan().all() and (cache[:, :, 1:] == 1e6).all(), "written after all"
    # Negative control: a sequence of the last token alone.
    alone = compiled(ids(batch)[:, -1:].contiguous(), torch.tensor([0]))
    assert relative(alone, full[:, -1:]) > 0.01


def test_transform_takes_static_buffers_too() -> None:
    full = feed(fast(2), ids(2), [TOTAL])
    model = fast(2)
    transform(model, ROOMY, compile="eager")
    assert relative(feed(model, ids(2)), full) <= TOLERANCE
    assert model.arkv.report().fused == 2


def test_two_instances_of_one_class_do_not_mix() -> None:
    """They share compiled graphs."""
    models = [fast(1), fast(1)]
    fulls = [feed(m, ids(1, seed=s), [TOTAL]) for s, m in enumerate(models)]
    compiled = [torch.compile(m, backend=ArkvBackend(ROOMY, compile="eager")) for m in models]
    for at in range(0, TOTAL, 4):
        for seed, call in enumerate(compiled):
            out = call(ids(1, seed=seed)[:, at : at + 4].contiguous(), torch.arange(at, at + 4))
            assert relative(out, fulls[seed][:, at : at + 4]) <= TOLERANCE


def test_an_evicting_state_replaces_the_buffers() -> None:
    model = fast(1)
    config = ArkvConfig(budget=16, window=4, sinks=2)
    compiled = torch.compile(model, backend=ArkvBackend(config, compile="eager"))
    runs = [feed(compiled, ids(1)) for _ in range(2)]
    assert torch.equal(*runs) and runs[0].isfinite().all()
    assert relative(runs[0], feed(fast(1), ids(1), [TOTAL])) > 1e-3


@pytest.mark.parametrize(
    ("tokens", "positions", "message"),
    [
        (1, [7], "from position 7 on, but the sequence holds 20"),
        (1, [30], "from position 30 on, but the sequence holds 20"),
        (2, [20, 22], r"at positions \[20, 22\], not one behind the other"),
    ],
)
def test_positions_that_jump_are_refused(tokens: int, positions: list[int], message: str) -> None:
    compiled = torch.compile(fast(1), backend=ArkvBackend(ROOMY, compile="eager"))
    feed(compiled, ids(1), [20])
    with pytest.raises(AbsorbedCacheError, match=message):
        compiled(ids(1)[:, :tokens].contiguous(), torch.tensor(positions))


def test_an_unknown_beginning_is_refused_and_the_buffer_says_nothing() -> None:
    model = fast(1)
    feed(model, ids(1), [20])  # not by us
    compiled = torch.compile(model, backend=ArkvBackend(ROOMY, compile="eager"))
    with pytest.raises(AbsorbedCacheError, match="not written by this compiled model"):
        compiled(ids(1)[:, :1].contiguous(), torch.tensor([20]))
    feed(compiled, ids(1), [20])
    # The model itself, uncompiled, would go on from a buffer that was never filled.
    assert model(ids(1)[:, :1], torch.tensor([20])).isnan().all()


class Buffered(nn.Module):
    """One attention over static buffers; how they are written, laid out and read is a test's."""

    def __init__(self, write: Any, turned: bool = False, read: Any = None) -> None:
        super().__init__()
        self.write, self.turned, self.read = write, turned, read
        shape = (2, 64, 3, 8) if turned else (2, 3, 64, 8)
        self.register_buffer("k", torch.zeros(shape))
        self.register_buffer("v", torch.zeros(shape))
        self.register_buffer("causal", torch.ones(64, 64, dtype=torch.bool).tril())
        self.embed, self.qkv = nn.Embedding(97, 24), nn.Linear(24, 72)

    def forward(self, ids: Tensor, pos: Any) -> Any:
        rows = self.qkv(self.embed(ids)).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (3, 8)) for x in rows)  # [B, T, H, D]
        if not self.turned:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.write(self.k, pos, k)
        self.write(self.v, pos, v)
        if self.read is not None:
            return self.read(self, q, pos)
        k, v = (x.transpose(1, 2) if self.turned else x for x in (self.k, self.v))
        mask = self.causal[None, None, pos]
        y: Tensor = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
        return y


def by_index(cache: Tensor, pos: Tensor, new: Tensor) -> None:
    cache[:, :, pos] = new


def by_index_turned(cache: Tensor, pos: Tensor, new: Tensor) -> None:
    cache[:, pos] = new


def by_index_copy(cache: Tensor, pos: Tensor, new: Tensor) -> None:
    cache.index_copy_(2, pos, new)


def by_index_copy_turned(cache: Tensor, pos: Tensor, new: Tensor) -> None:
    cache.index_copy_(-3, pos, new)


def by_index_put(cache: Tensor, pos: Tensor, new: Tensor) -> None:
    torch.ops.aten.index_put_(cache, [None, None, pos], new)


def check(model: Buffered, positions: Callable[[int, int], Any] = torch.arange) -> ArkvBackend:
    torch.manual_seed(0)
    plain = Buffered(model.write, model.turned, model.read)
    plain.load_state_dict(model.state_dict())
    backend = ArkvBackend(ROOMY, compile="eager")
    compiled = torch.compile(model, backend=backend)
    seen = 0
    for length in (9, 4, 1, 1, 1):
        new, at = ids(2)[:, seen : seen + length].contiguous(), positions(seen, seen + length)
        torch.testing.assert_close(compiled(new, at), plain(new, at))
        seen += length
    return backend


@pytest.mark.parametrize(
    ("write", "turned"),
    [
        (by_index, False),
        (by_index_copy, False),
        (by_index_put, False),
        (by_index_turned, True),
        (by_index_copy_turned, True),
    ],
)
def test_every_way_to_write_is_absorbed(write: Any, turned: bool) -> None:
    backend = check(Buffered(write, turned))
    assert [s.reason for sites in backend.sites for s in sites] == [""] * len(backend.sites)


def test_a_slice_from_a_start_and_its_filled_part() -> None:
    """The way of the first Llama: [B, S, H, D], no mask buffer, read as far as it is filled."""

    def write(cache: Tensor, start: int, new: Tensor) -> None:
        cache[: len(new), start : start + new.shape[1]] = new

    def read(model: Buffered, q: Tensor, start: int) -> Tensor:
        batch, length = q.shape[:2]
        k, v = (x[:batch, : start + length].transpose(1, 2) for x in (model.k, model.v))
        mask = None
        if length > 1:
            mask = torch.full((length, start + length), float("-inf")).triu(start + 1)
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)

    backend = check(Buffered(write, True, read), lambda start, end: start)
    assert [s.reason for sites in backend.sites for s in sites] == [""] * len(backend.sites)


def test_what_else_reads_a_buffer_leaves_it_as_it_is() -> None:
    def read(model: Buffered, q: Tensor, pos: Tensor) -> Any:
        y = scaled_dot_product_attention(
            q.transpose(1, 2), model.k, model.v, attn_mask=model.causal[None, None, pos]
        )
        return y, model.k.sum()

    (first, *_) = check(Buffered(by_index, False, read)).sites
    assert "the cache is also read by" in first[0].reason


def test_a_buffer_read_whole_without_a_mask_is_left_as_it_is() -> None:
    def read(model: Buffered, q: Tensor, pos: Tensor) -> Tensor:
        return scaled_dot_product_attention(q.transpose(1, 2), model.k, model.v)

    (first, *_) = check(Buffered(by_index, False, read)).sites
    assert "places of the buffer that nothing is written to" in first[0].reason


def test_positions_computed_in_the_graph_are_left_as_they_are() -> None:
    def write(cache: Tensor, pos: Tensor, new: Tensor) -> None:
        cache[:, :, pos + 1 - 1] = new

    (first, *_) = check(Buffered(write)).sites
    assert "computes in the graph where to write" in first[0].reason


# Past tensors in and out


def grow(call: Callable[..., Any], tokens: Tensor) -> Tensor:
    out, past, seen = [], None, 0
    for length in LENGTHS:
        new = tokens[:, seen : seen + length].contiguous()
        logits, past = call(new) if past is None else call(new, past)
        out.append(logits)
        seen += length
    return torch.cat(out, 1)


DECODERS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "t5_bias": {"t5_bias": True},
    "rotary-einsum": {"flash": False},
    "t5_bias-einsum": {"t5_bias": True, "flash": False},
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS.keys())
def test_x_transformers(options: dict[str, Any], batch: int) -> None:
    model = random_weights(x_transformers.Decoder(**options))
    full = model(ids(batch))[0]
    transform(model, ROOMY, compile="eager")
    assert relative(grow(model, ids(batch)), full) <= TOLERANCE
    report = model.arkv.report()
    assert report.fused == 2, report
    # Negative control: without its past the last token says something else.
    assert relative(model(ids(batch)[:, -1:].contiguous())[0], full[:, -1:]) > 0.01


def test_a_cropped_past_is_refused() -> None:
    model = random_weights(x_transformers.Decoder())
    transform(model, ROOMY, compile="eager")
    _, past = model(ids(1)[:, :20].contiguous())
    cropped = [tuple(x[:, :, :-1] for x in pair) for pair in past]
    with pytest.raises(AbsorbedCacheError, match="it was cropped"):
        model(ids(1)[:, 20:21].contiguous(), cropped)


class Turned(nn.Module):
    """Past tensors [B, T, H, D], turned for the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(97, 24), nn.Linear(24, 72)

    def forward(self, ids: Tensor, past: Any = None) -> Any:
        rows = self.qkv(self.embed(ids)).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (3, 8)) for x in rows)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], dim=-3)
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        y = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        return y.transpose(1, 2).flatten(2), (k, v)


def test_a_past_of_another_layout() -> None:
    model = random_weights(Turned())
    full = model(ids(2))[0]
    backend = ArkvBackend(ROOMY, compile="eager")
    assert relative(grow(torch.compile(model, backend=backend), ids(2)), full) <= TOLERANCE
    assert all(site.fused for sites in backend.sites for site in sites)
