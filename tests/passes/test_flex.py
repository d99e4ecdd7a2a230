"""``flex_attention``: its modifications are read like attention written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from arkv_fx.passes import find_flex
from pass_harness import (
    GROUPS,
    HEADS,
    ROOMY,
    cached,
    capture,
    check_output,
    session,
    tensors,
)
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    flex_attention,
)

from arkv_fx.compile.backend import ArkvBackend

SLOPES = torch.linspace(0.1, 0.6, HEADS * GROUPS)
TABLE = torch.linspace(-1, 1, 40)
PAIRS = torch.outer(TABLE, TABLE)
Index = Tensor


def causal(offset: Tensor, window: int = 100) -> Callable[..., Tensor]:
    def mask_mod(b: Index, h: Index, q: Index, kv: Index) -> Tensor:
        return (q + offset >= kv) & (q + offset - kv < window)

    return mask_mod


def blocks(q: Tensor, k: Tensor, **options: int) -> BlockMask:
    tokens, keys = q.shape[2], k.shape[2]
    shown = causal(torch.tensor(keys - tokens), **options)
    return create_block_mask(shown, None, None, tokens, keys, device="cpu")


def plain(score: Tensor, b: Index, h: Index, q: Index, kv: Index) -> Tensor:
    return score


def alibi(score: Tensor, b: Index, h: Index, q: Index, kv: Index) -> Tensor:
    return score + SLOPES[h] * (kv - q)


def capped(score: Tensor, b: Index, h: Index, q: Index, kv: Index) -> Tensor:
    return 2.0 * torch.tanh(score / 2.0)


def relative(score: Tensor, b: Index, h: Index, q: Index, kv: Index) -> Tensor:
    return score * 0.5 + TABLE[kv % 40]


def hiding(score: Tensor, b: Index, h: Index, q: Index, kv: Index) -> Tensor:
    return torch.where((kv % 3 != 1) | (h > 1), score, -float("inf"))


def first(backend: Any) -> Any:
    """The site of the prompt: later graphs say that it was left alone before."""
    return backend.sites[0][0]


def attention(score_mod: Callable[..., Tensor] | None, **options: Any) -> Callable[..., Any]:
    def attention(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Any:
        given = {"score_mod": score_mod, "block_mask": blocks(q, k), "enable_gqa": True, **options}
        return flex_attention(q, k, v, **given)

    return cached(attention=attention)


@pytest.mark.parametrize("score_mod", [None, plain, alibi, capped, relative, hiding])
@pytest.mark.parametrize("query_heads", [HEADS * GROUPS, HEADS])
def test_every_modification_is_rewritten(
    score_mod: Callable[..., Tensor] | None, query_heads: int
) -> None:
    """A prompt, a chunk and two single tokens."""
    backend = check_output(attention(score_mod), query_heads)
    assert all(s.fused for sites in backend.sites for s in sites), backend.sites


def test_a_mask_given_to_the_graph() -> None:
    """Made outside, as gpt-fast does: its ``mask_mod`` reads an offset that is an input."""

    def function(
        q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, handle: Tensor, total: int
    ) -> Tensor:
        keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
        return flex_attention(q, keys, values, block_mask=mask, enable_gqa=True)  # type: ignore[return-value]

    torch._dynamo.reset()
    backend = ArkvBackend(ROOMY, compile="eager")
    compiled = torch.compile(function, backend=backend)
    ours, other, total = session(), session(), 0
    for step, length in enumerate((6, 1, 1, 1)):
        total += length
        q, k, v = tensors(length, seed=step)
        mask = create_block_mask(
            causal(torch.tensor(total - length), 4), None, None, length, total, device="cpu"
        )
        expected = function(q, k, v, mask, other.handle, total)
        torch.testing.assert_close(compiled(q, k, v, mask, ours.handle, total), expected)
    assert all(s.fused for sites in backend.sites for s in sites)


def test_the_mask_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: indices in another order."""
    whole = find_flex._inlined

    def turned(graph: Any, mod: Any, given: list[Any], inputs: Any, emit: Any) -> Any:
        return whole(graph, mod, [*given[:-4], *given[-4:-2], *given[:-3:-1]], inputs, emit)

    monkeypatch.setattr(find_flex, "_inlined", turned)
    with pytest.raises(AssertionError, match="not close"):
        check_output(attention(alibi))


def summed(score: Tensor, b: Index, h: Index, q: Index, kv: Index) -> Tensor:
    return score + PAIRS[kv].sum()


def clamped(score: Tensor, b: Index, h: Index, q: Index, kv: Index) -> Tensor:
    return score.clamp(-1, 1)


def squared(score: Tensor, b: Index, h: Index, q: Index, kv: Index) -> Tensor:
    return score * score


@pytest.mark.parametrize(
    ("score_mod", "reason"),
    [(summed, "more than one number"), (clamped, "clamp"), (squared, "takes the logits twice")],
)
def test_what_is_not_followed_is_left_alone(score_mod: Callable[..., Tensor], reason: str) -> None:
    found = first(check_output(attention(score_mod), steps=(6, 1, 1)))
    assert not found.fused and reason in found.reason


def test_blocks_without_a_mask_mod_are_left_alone() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Any:
        number = torch.ones(1, 1, 1, dtype=torch.int32)
        index = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
        lengths = (q.shape[2], k.shape[2])
        mask = BlockMask.from_kv_blocks(number, index, seq_lengths=lengths)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    assert "leaves out blocks" in first(check_output(cached(attention=attend))).reason


def test_the_log_sum_exp_is_not_lost() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Any:
        out, lse = flex_attention(
            q, k, v, block_mask=blocks(q, k), enable_gqa=True, return_lse=True
        )
        return out * lse[..., None].sigmoid()

    assert "log-sum-exp" in first(check_output(cached(attention=attend))).reason


def test_nothing_that_makes_a_block_mask_is_left() -> None:
    found = capture(attention(alibi), *tensors(6))
    assert found.count("_vmap_increment_nesting") == (8, 0)
    assert found.count("argsort")[1] == found.count("flex_attention")[1] == 0


def test_what_a_mask_writes_is_still_written() -> None:
    """A counter that the mask reads in the step that moves it on."""
    counter = torch.tensor(0)

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: bool) -> Any:
        mask = create_block_mask(
            causal(counter.add_(1) - 1), None, None, q.shape[2], k.shape[2], device="cpu"
        )
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    found = capture(cached(attention=attend), *tensors(6))
    assert found.count("add_") == (1, 1) and found.context.fused
