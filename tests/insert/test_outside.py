"""Models written without transformers, into which a cache is inserted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from arkv_fx.passes import shift_positions
from models_outside.alibi_gpt import AlibiGPT
from models_outside.encoder_decoder import Transformer
from models_outside.nano_gpt import GPT, GPTConfig
from models_outside.sample import ROOMY, TOLERANCE, TOTAL, VOCABULARY, ids, random_weights
from torch import Tensor, nn

from arkv_fx import ArkvCache, ArkvConfig, restore, transform
from arkv_fx.errors import CacheError, TransformError, UnknownOptionError

Call = Callable[[nn.Module, Tensor, dict[str, Any]], Tensor]
PROMPT, CHUNK = 20, 5


def nano_gpt() -> tuple[nn.Module, Call]:
    def call(model: nn.Module, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        logits, loss = model(tokens, **options)
        assert loss is None
        return logits[:, -1]

    return GPT(GPTConfig()), call


def manual_nano_gpt() -> tuple[nn.Module, Call]:
    return GPT(GPTConfig(flash=False)), nano_gpt()[1]


def flex_nano_gpt() -> tuple[nn.Module, Call]:
    return GPT(GPTConfig(flex=True)), nano_gpt()[1]


def translator() -> tuple[nn.Module, Call]:
    def call(model: nn.Module, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        source = ids(len(tokens), 11, seed=7)
        y: Tensor = model(source, tokens, **options)[:, -1]
        return y

    return Transformer(), call


def alibi(flash: bool, max_len: int = 64) -> tuple[nn.Module, Call]:
    return AlibiGPT(flash=flash, max_len=max_len), lambda model, tokens, options: model(
        tokens, **options
    )[:, -1]


CACHELESS: dict[str, Callable[[], tuple[nn.Module, Call]]] = {
    "nano_gpt": nano_gpt,
    "nano_gpt_manual": manual_nano_gpt,
    "nano_gpt_flex": flex_nano_gpt,
    "translator": translator,
    "alibi_manual": lambda: alibi(False),
    "alibi": lambda: alibi(True),
}


def lengths() -> list[int]:
    """A prompt, a chunk, and the rest token by token."""
    return [PROMPT, CHUNK, *[1] * (TOTAL - PROMPT - CHUNK)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CACHELESS)
def test_bit_by_bit_is_the_full_forward(name: str, lowering: str) -> None:
    model, call = CACHELESS[name]()
    random_weights(model)
    with torch.no_grad():
        expected = {b: call(model, ids(b), {}) for b in (1, 2)}
    transform(model, ROOMY, insert_cache=True, compile=lowering)
    for batch in (1, 2):
        tokens, cache, seen = ids(batch), ArkvCache(model), 0
        for length in lengths():
            new = tokens[:, seen : seen + length]
            out = call(model, new, {"cache": cache})
            seen += length
            with torch.no_grad():
                full = call(model, tokens[:, :seen], {})
            assert relative(out, full) <= TOLERANCE, f"after {seen} tokens"
        assert cache.get_seq_length() == TOTAL
        assert torch.equal(full, expected[batch]), "the model without a cache changed"
        # Negative control: what was cached matters.
        alone = call(model, tokens[:, -1:], {"cache": ArkvCache(model)})
        assert relative(alone, full) > 0.01
    report = model.arkv.report()
    assert report.fused == 2, report
    restore(model)
    assert "forward" not in model.__dict__ and not hasattr(model, "arkv")


def test_cross_attention_and_encoders_are_left_alone() -> None:
    model, call = translator()
    random_weights(model)
    transform(model, ROOMY, insert_cache=True, compile="eager")
    call(model, ids(1), {"cache": ArkvCache(model)})
    rows = {row["path"]: row for row in model.arkv.report().rows}
    assert {path for path, row in rows.items() if row["fused"]} == {
        "decoder.0.self_attn", "decoder.1.self_attn",
    }  # fmt: skip
    for path in ("encoder.0.self_attn", "encoder.1.self_attn"):
        assert "bidirectional" in rows[path]["reason"]
    for path in ("decoder.0.cross_attn", "decoder.1.cross_attn"):
        assert "not self-attention" in rows[path]["reason"]


def test_an_evicting_cache_stays_small_and_says_the_same_twice() -> None:
    model, call = nano_gpt()
    random_weights(model)
    transform(model, ArkvConfig(budget=16, window=4, sinks=2), insert_cache=True, compile="eager")
    runs, sizes = [], set()
    for _ in range(2):
        cache = ArkvCache(model)
        out = [call(model, ids(1)[:, :PROMPT], {"cache": cache})]
        for i in range(PROMPT, TOTAL):
            out.append(call(model, ids(1)[:, i : i + 1], {"cache": cache}))
            sizes.add(cache.nbytes())
        runs.append(torch.stack(out))
    assert torch.equal(*runs) and runs[0].isfinite().all()
    assert sizes == {model.arkv.report().nbytes + 8}


def test_two_sequences_side_by_side_do_not_mix() -> None:
    model, call = nano_gpt()
    random_weights(model)
    transform(model, ROOMY, insert_cache=True, compile="eager")
    texts = [ids(1, seed=3), ids(1, seed=4)]
    caches = [ArkvCache(model) for _ in texts]
    for i in range(0, TOTAL, 4):
        for tokens, cache in zip(texts, caches, strict=True):
            out = call(model, tokens[:, i : i + 4], {"cache": cache})
            assert relative(out, call(model, tokens[:, : i + 4], {}).detach()) <= TOLERANCE


def test_a_reset_cache_starts_anew_and_a_used_one_keeps_its_batch() -> None:
    model, call = nano_gpt()
    random_weights(model)
    transform(model, ROOMY, insert_cache=True, compile="eager")
    cache = ArkvCache(model)
    first = call(model, ids(1), {"cache": cache})
    with pytest.raises(CacheError, match="holds 1 sequences, this call has 2"):
        call(model, ids(2)[:, :1], {"cache": cache})
    cache.reset()
    assert torch.equal(call(model, ids(1), {"cache": cache}), first)


def test_positions_end_where_the_tables_end() -> None:
    model, call = nano_gpt()
    transform(model.eval(), ROOMY, insert_cache=True, compile="eager")
    cache = ArkvCache(model)
    call(model, ids(1, 60), {"cache": cache})
    with pytest.raises(CacheError, match=r"60 tokens and 5 more came.*positions for 64"):
        call(model, ids(1, 5), {"cache": cache})
    call(model, ids(1, 4), {"cache": cache})
    assert cache.get_seq_length() == 64


def test_wrong_use_is_refused() -> None:
    model, call = nano_gpt()
    with pytest.raises(TransformError, match=r"call model.eval\(\)"):
        transform(model.train(), ROOMY, insert_cache=True)
    transform(model.eval(), ROOMY, insert_cache=True, compile="eager")
    with pytest.raises(TransformError, match="transformed already"):
        transform(model, ROOMY, insert_cache=True)
    with pytest.raises(CacheError, match="cache is a list"):
        call(model, ids(1), {"cache": []})
    other = transform(nano_gpt()[0].eval(), ROOMY, insert_cache=True, compile="eager")
    with pytest.raises(CacheError, match="belongs to GPT#"):
        call(model, ids(1), {"cache": ArkvCache(other)})
    cache = ArkvCache(model)
    with pytest.raises(CacheError, match="not differentiated"):
        call(model.train(), ids(1), {"cache": cache})
    with pytest.raises(UnknownOptionError, match="compile='jit'"):
        transform(nano_gpt()[0].eval(), ROOMY, insert_cache=True, compile="jit")


# What the self-check and the passes refuse


class Small(nn.Module):
    """One causal attention over embeddings, and what a test adds to it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 48)
        self.options = options
        self.register_buffer("band", torch.ones(32, 32).tril().triu(-4).bool())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mask = self.mask(ids)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )
        return self.after(y.transpose(1, 2).flatten(2))

    def mask(self, ids: Tensor) -> Tensor | None:
        return None

    def after(self, y: Tensor) -> Tensor:
        return y


class Mixing(Small):
    def after(self, y: Tensor) -> Tensor:
        return y + y.cumsum(1)


class Counting(Small):
    def after(self, y: Tensor) -> Tensor:
        self.count += 1
        return y


class Bidirectional(Small):
    def mask(self, ids: Tensor) -> Tensor | None:
        return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)


class Padded(Small):
    def mask(self, ids: Tensor) -> Tensor | None:
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return causal & (ids != 0)[:, None, None]


class Banded(Small):
    def mask(self, ids: Tensor) -> Tensor | None:
        return self.band[: ids.shape[1], : ids.shape[1]]  # type: ignore[index]


class Computed(Small):
    """A window that no short sample shows."""

    def mask(self, ids: Tensor) -> Tensor | None:
        i = torch.arange(ids.shape[1])
        return (i[None] <= i[:, None]) & (i[:, None] - i[None] < 20)


class Alibi(Small):
    """Computed, so that no table bounds it."""

    def mask(self, ids: Tensor) -> Tensor | None:
        i = torch.arange(ids.shape[1])
        ahead = i[None] - i[:, None]
        slopes = torch.tensor([0.5, 0.01]).view(1, 2, 1, 1)
        return (slopes * ahead).masked_fill(ahead > 0, float("-inf"))


class Bucketed(Small):
    """T5's: learned for each distance."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(9, 2)

    def mask(self, ids: Tensor) -> Tensor | None:
        i = torch.arange(ids.shape[1])
        back = (i.unsqueeze(1) - i.unsqueeze(0)).clamp(0, 8)
        causal = torch.triu(torch.full((ids.shape[1], ids.shape[1]), float("-inf")), 1)
        return self.bias(back).permute(2, 0, 1).unsqueeze(0) + causal


class Sorted(Small):
    """A bias that is not followed."""

    def mask(self, ids: Tensor) -> Tensor | None:
        i = torch.arange(ids.shape[1])
        ahead = (i[None] - i[:, None]).float().sort(-1).values
        return ahead.masked_fill(ahead > 0, float("-inf"))


class Counted(Small):
    def mask(self, ids: Tensor) -> Tensor | None:
        return torch.ones(len(ids[0]), len(ids[0]), dtype=torch.bool).tril()


class Branching(Small):
    def after(self, y: Tensor) -> Tensor:
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Mixing, "output 0.*differs from the full forward.*no attention was left alone"),
        (Counting, "writes to .*count"),
        (Bidirectional, "no causal self-attention.*\n.*does not hide later tokens"),
        (Padded, "no causal self-attention.*\n.*depends on what the model is given"),
        (Sorted, "a bias by position is computed by .*sort.*cannot be followed"),
        (Counted, r"number of tokens is always 11.*len\(\)"),
        (Branching, "cannot be traced as one graph"),
    ],
)
def test_what_would_be_wrong_is_refused(model: type[Small], message: str) -> None:
    net = random_weights(model())
    before = net(ids(1))
    with pytest.raises(TransformError, match=message):
        transform(net, ROOMY, insert_cache=True, compile="eager")
    assert torch.equal(net(ids(1)), before) and not hasattr(net, "arkv")


@pytest.mark.parametrize(("model", "window", "total"), [(Banded, 5, 32), (Computed, 20, 40)])
def test_a_window_in_the_mask_is_kept(model: type[Small], window: int, total: int) -> None:
    net = random_weights(model())
    tokens = ids(1, total)
    with torch.no_grad():
        full = net(tokens)
    transform(net, ROOMY, insert_cache=True, compile="eager")
    cache = ArkvCache(net)
    out = [net(tokens[:, :7], cache=cache)]
    out += [net(tokens[:, i : i + 1], cache=cache) for i in range(7, total)]
    assert relative(torch.cat(out, 1), full) <= TOLERANCE
    (state,) = cache.session.layers.values()
    assert state.plan.sliding == window


@pytest.mark.parametrize("model", [Alibi, Bucketed])
def test_a_bias_by_position_reaches_over_a_long_text(model: type[Small]) -> None:
    """Beyond the columns that it has at first, too."""
    net = random_weights(model())
    tokens = ids(1, 300)
    with torch.no_grad():
        full = net(tokens)
    transform(net, ArkvConfig(budget=320, tiers=("native",)), insert_cache=True, compile="eager")
    cache, out = ArkvCache(net), []
    for start, end in ((0, 240), (240, 252), *((i, i + 1) for i in range(252, 300))):
        out.append(net(tokens[:, start:end], cache=cache))
    assert relative(torch.cat(out, 1), full) <= TOLERANCE
    columns = {key[-1] for key in net.arkv.programs}
    assert columns == {0, 256, 512}


def test_embeddings_as_input_and_a_sample() -> None:
    net = random_weights(Small())
    x = net.embed(ids(2)).detach()
    net.embed = nn.Identity()
    with torch.no_grad():
        full = net(x)
    transform(net, ROOMY, insert_cache=True, compile="eager", sample=x)
    cache = ArkvCache(net)
    out = torch.cat([net(x[:, :30], cache=cache), net(x[:, 30:], cache=cache)], 1)
    assert relative(out, full) <= TOLERANCE


def test_positions_that_start_anew_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the self-check."""
    monkeypatch.setattr(shift_positions, "counts", lambda *_: False)
    model = random_weights(nano_gpt()[0])
    with pytest.raises(TransformError, match="differs from the full forward by"):
        transform(model, ROOMY, insert_cache=True, compile="eager")
