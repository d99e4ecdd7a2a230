"""Sequences do not touch each other: not in a batch, not side by side, not across turns."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_attention import Layer, make_mask
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import arkv_fx.ops.attend as attend_module
from arkv_fx import ArkvCache, ArkvConfig, models, transform
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.scores import SCORES
from arkv_fx.state.session import Session

EVICTING = ArkvConfig(budget=24, window=4, sinks=2, tiers=("int8", "int4"))
ROOMY = ArkvConfig(budget=128, tiers=("native",))

# One layer


@dataclass(frozen=True)
class Batch:
    """Left padding of each row, the lengths of the calls, and the plan."""

    pad: tuple[int, ...]
    lengths: tuple[int, ...]
    plan: LayerPlan
    seed: int


def outputs(batch: Batch, rows: list[int], padded: bool) -> tuple[list[Tensor], Layer]:
    """Outputs of those rows, with their padding or alone without it."""
    generator = torch.Generator().manual_seed(batch.seed)
    layer = Layer(batch.plan, len(rows))
    out, start = [], 0
    for number, length in enumerate(batch.lengths):
        q, k, v = (torch.randn(len(batch.pad), h, length, 8, generator=generator)[rows]
                   for h in (4, 2, 2))  # fmt: skip
        # The first call is padded; a row alone is shorter by its padding.
        skip = 0 if padded or number else batch.pad[rows[0]]
        position = torch.arange(start, start + length)
        valid = (position[None] >= torch.tensor([batch.pad[r] for r in rows])[:, None])[:, skip:]
        mask = make_mask(torch.cat([layer.valid, valid], 1), length - skip,
                         kind="bool" if padded else "none", sliding=batch.plan.sliding)  # fmt: skip
        new = (x[:, :, skip:] for x in (q, k, v))
        out.append(layer.step(*new, mask, Knobs(0.35), valid, fresh=number == 0))
        start += length
    return out, layer


def check_rows(batch: Batch) -> None:
    together, layer = outputs(batch, list(range(len(batch.pad))), padded=True)
    for row, pad in enumerate(batch.pad):
        alone, own = outputs(batch, [row], padded=False)
        for number, (a, b) in enumerate(zip(together, alone, strict=True)):
            a = a[row : row + 1, :, -b.shape[2] :]
            assert torch.allclose(a, b, atol=1e-5), f"row {row} differs in call {number}"
        for a, b in zip(layer.state.view().segments, own.state.view().segments, strict=True):
            shifted = torch.where(b.pos >= 0, b.pos + pad, -1)
            assert torch.equal(a.pos[row].sort().values, shifted[0].sort().values), "other tokens"


@pytest.mark.parametrize("score", SCORES)
def test_a_padded_row_of_a_layer_is_what_it_is_alone(score: str) -> None:
    @settings(max_examples=15)
    @given(
        st.lists(st.integers(0, 12), min_size=2, max_size=3),
        st.lists(st.sampled_from((1, 1, 1, 4)), max_size=8),
        st.sampled_from((0, 0, 6)),
        st.integers(0, 99),
    )
    def same(pad: list[int], later: list[int], sliding: int, seed: int) -> None:
        tiers = (Tier("int8", 4), Tier("int4", 3))
        sinks = 0 if sliding else 1
        plan = LayerPlan(2, 8, 8, torch.float32, 3, sinks, sliding, tiers, score)
        check_rows(Batch(tuple(pad), (14, *later), plan, seed))

    same()


def test_stored_padding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: padding counts as text."""
    plan = LayerPlan(2, 8, 8, torch.float32, 3, 1, 0, (Tier("native", 4),), "mass")
    batch = Batch((0, 5), (14, 1, 1, 1), plan, 0)
    check_rows(batch)
    monkeypatch.setattr(
        attend_module, "_valid", lambda m, b, t, d: torch.ones(b, t, dtype=torch.bool)
    )
    with pytest.raises(AssertionError, match=r"differs|other tokens"):
        check_rows(batch)


# A model


@pytest.fixture(scope="module")
def evicting() -> PreTrainedModel:
    model = models.random_model("llama")
    transform(model, EVICTING, compile="eager")
    return model


@pytest.fixture(scope="module")
def roomy() -> PreTrainedModel:
    model = models.random_model("llama", num_hidden_layers=1)
    transform(model, ROOMY, compile="eager")
    return model


def ids(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_padded_row_of_a_model_is_what_it_is_alone(evicting: PreTrainedModel) -> None:
    text, mask = ids(40, 3), torch.ones(3, 40, dtype=torch.long)
    mask[1, :9], mask[2, :21] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "output_logits": True,
                               "return_dict_in_generate": True}  # fmt: skip
    together = evicting.generate(text * mask, attention_mask=mask, **options)
    for row, pad in enumerate((0, 9, 21)):
        alone = evicting.generate(text[row : row + 1, pad:], **options)
        assert torch.equal(together.sequences[row, pad:], alone.sequences[0])
        for a, b in zip(together.logits, alone.logits, strict=True):
            assert torch.allclose(a[row], b[0], atol=1e-3)
    full = models.random_model("llama").generate(text[:1], **options)
    difference = torch.stack(full.logits)[:, 0] - torch.stack(together.logits)[:, 0]
    assert difference.abs().max() > 0.1, "nothing was evicted: this tests nothing"


@torch.no_grad()
def run_steps(model: PreTrainedModel, text: Tensor, cache: Any) -> list[Tensor]:
    out = [model(text[:, :10], past_key_values=cache).logits[:, -1]]
    for t in range(10, text.shape[1]):
        out.append(model(text[:, t : t + 1], past_key_values=cache).logits[:, -1])
    return out


@torch.no_grad()
def interleave(model: PreTrainedModel) -> None:
    texts = [ids(26, seed=1), ids(26, seed=2)]
    expected = [run_steps(model, text, ArkvCache(model)) for text in texts]
    caches = [ArkvCache(model), ArkvCache(model)]
    found: list[list[Tensor]] = [[], []]
    for start, end in [(0, 10), *((t, t + 1) for t in range(10, 26))]:
        for text, cache, out in zip(texts, caches, found, strict=True):
            out.append(model(text[:, start:end], past_key_values=cache).logits[:, -1])
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "sequences mix"


def test_interleaved_sequences_do_not_mix(evicting: PreTrainedModel) -> None:
    interleave(evicting)


def test_shared_state_is_noticed(
    evicting: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: one state for all sequences."""
    states: dict[int, Any] = {}
    layer = Session.layer

    def shared(self: Session, index: int, *args: Any) -> Any:
        return states.setdefault(index, layer(self, index, *args))

    monkeypatch.setattr(Session, "layer", shared)
    with pytest.raises(AssertionError, match="sequences mix"):
        interleave(evicting)


def test_a_used_cache_can_be_reset(evicting: PreTrainedModel) -> None:
    cache = ArkvCache(evicting)
    first = run_steps(evicting, ids(26), cache)
    cache.reset()
    again = run_steps(evicting, ids(26), cache)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@torch.no_grad()
def test_a_copied_cache_is_a_sequence_of_its_own(evicting: PreTrainedModel) -> None:
    """A prefix read once, continued twice."""
    text = ids(40, seed=4)
    expected = run_steps(evicting, text, ArkvCache(evicting))
    prefix = ArkvCache(evicting)
    evicting(text[:, :10], past_key_values=prefix)
    copied = copy.deepcopy(prefix)
    run = [evicting(ids(1, seed=t), past_key_values=prefix).logits for t in range(20)]
    assert all(x.isfinite().all() for x in run)
    for t in range(10, 40):
        found = evicting(text[:, t : t + 1], past_key_values=copied).logits[:, -1]
        assert torch.equal(found, expected[t - 9])
    assert copied.get_seq_length() == 40 and prefix.get_seq_length() == 30


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(10, 7, 23), (1, 39), (38, 2)])
def test_a_prompt_in_chunks_is_the_whole_prompt(
    roomy: PreTrainedModel, chunks: tuple[int, ...]
) -> None:
    text = ids(40)
    whole = models.random_model("llama", num_hidden_layers=1)(text).logits
    cache, out = ArkvCache(roomy), []
    for part in text.split(list(chunks), 1):
        out.append(roomy(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(out, 1), whole, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_a_second_turn_continues_the_first(roomy: PreTrainedModel) -> None:
    """By `generate()`, which sends only what the cache has not seen."""
    plain = models.random_model("llama", num_hidden_layers=1)
    answers = []
    for model, cache in ((roomy, ArkvCache(roomy)), (plain, DynamicCache(config=plain.config))):
        text = ids(20)
        for turn in range(3):
            text = model.generate(
                text, past_key_values=cache, max_new_tokens=8, do_sample=False,
                attention_mask=torch.ones_like(text),
            )  # fmt: skip
            assert cache.get_seq_length() == text.shape[1] - 1
            text = torch.cat([text, ids(6, seed=turn + 5)], 1)
        answers.append(text)
    assert torch.equal(*answers)


@torch.no_grad()
def test_turns_of_an_evicting_cache_remember(evicting: PreTrainedModel) -> None:
    """The second turn depends on the first: nobody started afresh."""
    second = ids(12, seed=9)
    logits = []
    for seed in (1, 2):
        cache = ArkvCache(evicting)
        evicting(ids(30, seed=seed), past_key_values=cache)
        logits.append(evicting(second, past_key_values=cache).logits)
        assert cache.session.layers[0].view().count.tolist() == [42]
    assert (logits[0] - logits[1]).abs().max() > 0.01
