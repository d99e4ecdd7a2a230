"""Training mode, gradients and saliency: what the plain model does, with a small cache beside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EncoderDecoderCache, T5Config, T5ForConditionalGeneration

import arkv_fx
from arkv_fx.errors import CacheError
from arkv_fx.huggingface.unfilled import UnfilledCache
from arkv_fx.models import random_model

ROOMY = arkv_fx.ArkvConfig(budget=96, window=8, tiers=("native",))
SMALL = arkv_fx.ArkvConfig(budget=24, window=8, tiers=("native",))


def ids(tokens: int = 40) -> Tensor:
    return torch.randint(1, 128, (1, tokens), generator=torch.Generator().manual_seed(0))


def transformed(config: arkv_fx.ArkvConfig = ROOMY, compile: str = "eager", **kind: Any) -> Any:
    return arkv_fx.transform(random_model("llama", **kind), config, compile=compile)


def saliency(model: Any, **options: Any) -> Tensor:
    embeds = model.get_input_embeddings()(ids()).detach().requires_grad_()
    model(inputs_embeds=embeds, **options).logits.sum().backward()
    assert embeds.grad is not None
    return embeds.grad


@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
@pytest.mark.parametrize("compile", ["eager", "inductor"])
def test_saliency(compile: str, options: dict[str, Any]) -> None:
    expected = saliency(random_model("llama"))
    found = saliency(transformed(SMALL, compile), **options)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_gradients_of_parameters() -> None:
    plain, model = random_model("llama"), transformed(SMALL)
    for each in (plain, model):
        each(ids(), labels=ids()).loss.backward()
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-3)


def test_who_forgets_no_grad_goes_on_with_a_small_cache() -> None:
    model = transformed(SMALL)
    with torch.no_grad():
        expected = model(ids())
        after = model(ids(1), past_key_values=copy.deepcopy(expected.past_key_values)).logits
    prompt = ids()
    out = model(prompt)
    assert out.logits.requires_grad and type(out.past_key_values) is UnfilledCache
    prompt.zero_()  # the caller's own
    twin = copy.deepcopy(out.past_key_values)
    for cache in (out.past_key_values, twin):
        assert cache.get_seq_length() == 40 and type(cache) is arkv_fx.ArkvCache
        assert cache.nbytes() == expected.past_key_values.nbytes()
        found = model(ids(1), past_key_values=cache)
        torch.testing.assert_close(found.logits, after)
        assert cache.get_seq_length() == 41
    # As with no_grad, in a tuple.
    logits, cache = model(ids(), return_dict=False)
    assert logits.requires_grad and cache.nbytes() == twin.nbytes()


def test_a_cache_that_is_asked_for_comes_at_once() -> None:
    out = transformed()(ids(), use_cache=True)
    assert type(out.past_key_values) is arkv_fx.ArkvCache


def test_a_call_with_a_cache_says_that_it_has_no_gradient() -> None:
    model = transformed(SMALL)
    with pytest.raises(CacheError, match=r"is not differentiated\. Call.*use_cache=False"):
        saliency(model, use_cache=True)
    out = model(ids(), use_cache=True, output_hidden_states=True)
    after = model(ids(1), past_key_values=out.past_key_values)
    for numbers in (out.logits, out.hidden_states[1], after.logits):
        with pytest.raises(CacheError, match="not differentiated"):
            numbers.sum().backward()
    with torch.no_grad():
        assert not model(ids(), use_cache=True).logits.requires_grad
    model.requires_grad_(False)
    assert not model(ids(), use_cache=True).logits.requires_grad


def test_the_report_tells_of_generation_after_gradients() -> None:
    model = transformed()
    model(ids())
    assert model.arkv.report().fused == 2


def test_an_encoder_decoder_answers_with_gradients_too() -> None:
    config = T5Config(
        d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=128,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = arkv_fx.transform(
        T5ForConditionalGeneration(config).eval(), SMALL, compile="eager"
    )
    given = {"input_ids": ids(), "decoder_input_ids": ids(9)}
    with torch.no_grad():
        whole = model(**given).past_key_values
        expected = model(**given, past_key_values=None).logits
        after = model(input_ids=ids(), decoder_input_ids=ids(1), past_key_values=whole).logits
    out = model(**given)
    assert out.logits.requires_grad and isinstance(out.past_key_values, EncoderDecoderCache)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        found = model(
            input_ids=ids(), decoder_input_ids=ids(1), past_key_values=out.past_key_values
        ).logits
    torch.testing.assert_close(found, after)


def test_generation_in_train_mode() -> None:
    kind: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = random_model("llama").generate(ids(), **kind)
    model = transformed().train()
    out = model.generate(ids(), return_dict_in_generate=True, **kind)
    assert torch.equal(out.sequences, expected) and model.training
    assert isinstance(out.past_key_values, arkv_fx.ArkvCache) and model.arkv.report().fused == 2
    with pytest.raises(CacheError, match=r"not differentiated: use torch.no_grad\(\)"):
        model(ids(), past_key_values=arkv_fx.ArkvCache(model))
    model(ids(), labels=ids()).loss.backward()  # and the update that follows a rollout
    assert model.lm_head.weight.grad is not None


def test_dropout_in_train_mode_is_the_plain_models() -> None:
    plain = random_model("llama", attention_dropout=0.5).train()
    model = transformed(attention_dropout=0.5).train()
    kind: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    torch.manual_seed(0)
    expected = plain.generate(ids(), **kind)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids(), **kind), expected)
    assert "attention dropout is on" in str(model.arkv.report())
    # Once it is off the cache is small again.
    out = model.eval().generate(ids(), return_dict_in_generate=True, **kind)
    assert len(out.past_key_values.session.layers) == 2
