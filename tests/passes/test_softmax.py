"""Attention written by hand: every spelling is rewritten and gives the same, or says why not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from arkv_fx.passes import heads
from pass_harness import (
    DIM,
    GROUPS,
    HEADS,
    cached,
    check_output,
    interleaved,
    lift,
    repeated,
    tiled,
    transposed,
)  # fmt: skip
from torch import Tensor

SCALE = DIM**-0.5
LOW = torch.finfo(torch.float32).min
SINKS = torch.linspace(-1, 2, HEADS * GROUPS)
SLOPES = torch.linspace(0.1, 0.6, HEADS * GROUPS)[:, None, None]

Attention = Callable[..., Tensor]


def shown(q: Tensor, k: Tensor) -> Tensor:
    """Causal, as a bool [T, S]."""
    tokens, keys = q.shape[-2], k.shape[-2]
    return torch.arange(keys) <= torch.arange(keys - tokens, keys)[:, None]


def hidden(q: Tensor, k: Tensor) -> Tensor:
    """Causal, as what is added [T, S]."""
    return torch.where(shown(q, k), 0.0, LOW)


def products(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def multiplied(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    return F.softmax(products(q, k) * SCALE + hidden(q, k), -1) @ v


def divided(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    logits = torch.matmul(q, k.mT) / math.sqrt(DIM)
    return torch.matmul(torch.softmax(logits.masked_fill(~shown(q, k), -1e9), dim=-1), v)


def queries_scaled(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    logits = torch.where(shown(q, k), products(q * SCALE, k), torch.full((), LOW))
    return logits.softmax(-1) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    logits = products(q, k) * SCALE + hidden(q, k)
    weights = F.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, 0.1, training=False) @ v


def less_maximum(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    logits = products(q, k) * SCALE + hidden(q, k)
    logits = torch.max(logits, torch.tensor(LOW))
    return F.softmax(logits - logits.max(-1, keepdim=True).values, -1) @ v


def merged(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    """Batch and heads as one dimension, as old encoder-decoders do."""
    b, h, t, d = q.shape
    s = k.shape[2]
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    logits = torch.bmm(q, k.transpose(1, 2)) * SCALE
    logits = (logits.view(b, h, t, s) + hidden(q, k)).view(b * h, t, s)
    return torch.bmm(F.softmax(logits, -1), v).view(b, h, t, d)


def biased(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    """ALiBi through ``baddbmm``, as BLOOM does."""
    b, h, t, d = q.shape
    s = k.shape[2]
    alibi = (SLOPES * torch.arange(s)).expand(b, h, 1, s).reshape(b * h, 1, s)
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    logits = alibi.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=1.0, alpha=SCALE)
    weights = F.softmax(logits.view(b, h, t, s) + hidden(q, k), -1)
    return torch.bmm(weights.view(b * h, t, s), v).view(b, h, t, d)


def einsums(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE + hidden(q, k)
    return torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), v)


def capped(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    logits = torch.tanh(products(q, k) * SCALE / 2.0) * 2.0
    return F.softmax(logits + hidden(q, k), -1) @ v


def with_sinks(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    b, h, t, _d = q.shape
    logits = products(q, k) * SCALE + hidden(q, k)
    sinks = SINKS[:h].reshape(1, -1, 1, 1).expand(b, -1, t, -1)
    joined = torch.cat([logits, sinks], -1)
    weights = F.softmax(joined - joined.max(-1, keepdim=True).values, -1)
    return weights[..., :-1] @ v


def sinks_behind(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    logits = products(q, k) * SCALE + hidden(q, k)
    seen = torch.logsumexp(logits, -1) - SINKS[: q.shape[1]].view(1, -1, 1)
    return F.softmax(logits, -1) @ v * torch.sigmoid(seen)[..., None]


SPELLINGS = [
    multiplied, divided, queries_scaled, upcast, less_maximum, merged, biased, einsums, capped,
    with_sinks, sinks_behind,
]  # fmt: skip


@pytest.mark.parametrize("expand", [interleaved, repeated], ids=["heads", "copies"])
@pytest.mark.parametrize("attention", SPELLINGS)
def test_every_spelling_is_rewritten(
    attention: Attention, expand: Callable[[Tensor], Tensor]
) -> None:
    """With the copies of a kv head side by side, and with all kv heads behind each other."""
    backend = check_output(cached(expand, attention))
    assert all(s.fused for sites in backend.sites for s in sites)
    caches = [s.cache for sites in backend.sites for s in sites]
    assert all(not cache.computed for cache in caches), "only looked through"


@pytest.mark.parametrize("expand", [lift, tiled, transposed])
@pytest.mark.parametrize("attention", [biased, with_sinks, sinks_behind])
def test_what_belongs_to_a_head_follows_it(
    attention: Attention, expand: Callable[[Tensor], Tensor]
) -> None:
    check_output(cached(expand, attention))


def test_sinks_of_other_heads_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: sinks in the model's order where its copies come first."""
    monkeypatch.setattr(heads, "sinks", lambda site, emit: site.sinks)
    check_output(cached(interleaved, with_sinks))
    with pytest.raises(AssertionError, match="not close"):
        check_output(cached(repeated, with_sinks))


def returns_weights(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    weights = F.softmax(products(q, k) * SCALE + hidden(q, k), -1)
    return weights @ v + weights.sum(-1, keepdim=True)


def sharpened(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    logits = products(q, k) * SCALE + hidden(q, k)
    return F.softmax(logits, -1).square() @ v


def scaled_by_tensor(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    return F.softmax(products(q, k) * SINKS.view(1, -1, 1, 1) + hidden(q, k), -1) @ v


def clipped(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    logits = (products(q, k) * SCALE).clamp(min=-1.0)
    return F.softmax(logits + hidden(q, k), -1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    return F.softmax(products(q, k) * SCALE, -2) @ v


def hidden_weakly(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Tensor:
    return F.softmax((products(q, k) * SCALE).masked_fill(~shown(q, k), -3.0), -1) @ v


@pytest.mark.parametrize(
    "attention, reason",
    [
        (returns_weights, ""),
        (sharpened, "square"),
        (scaled_by_tensor, "is not a constant"),
        (clipped, "changes logits that are not masked"),
        (over_queries, "runs over dimension"),
        (hidden_weakly, "hides nothing"),
    ],
)
def test_what_is_not_understood_stays_and_says_why(attention: Attention, reason: str) -> None:
    backend = check_output(cached(interleaved, attention))
    assert not any(s.fused for sites in backend.sites for s in sites)
    assert all(reason in s.reason for sites in backend.sites for s in sites)
