"""After a transform no generation runs on a cache that is not ours without a word."""

from __future__ import annotations

import gc
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from transformers import (
    DynamicCache,
    GenerationConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import arkv_fx
from arkv_fx.errors import CacheError, TransformError
from arkv_fx.huggingface.model_caches import new_cache
from arkv_fx.models import random_model
from arkv_fx.zoo.configs import tiny_model

CONFIG = arkv_fx.ArkvConfig(budget=24, window=8, sinks=2, tiers=("native",))
NEW = 6


def ids(tokens: int = 60) -> Tensor:
    return torch.randint(1, 128, (1, tokens), generator=torch.Generator().manual_seed(0))


class WithValues(nn.Module):
    """Hands generation on, and has a forward of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(64, 1)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        out = self.inner(input_ids, output_hidden_states=True, **kwargs)
        return out.logits, self.head(out.hidden_states[-1])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.generate(*args, **kwargs)


class Asking(WithValues):
    """Answers for what it wraps, as PEFT models do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Two(WithValues):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.reference = random_model("llama", seed=3)


def generate(model: Any, **options: Any) -> Any:
    return model.generate(
        ids(), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **options
    )


@pytest.mark.parametrize("wrap", [WithValues, Asking, torch.compile])
def test_wrappers_are_seen_through(wrap: Any) -> None:
    plain = arkv_fx.transform(random_model("llama"), CONFIG, compile="eager")
    expected = generate(plain).sequences
    inner = random_model("llama")
    full = generate(inner).sequences
    assert not torch.equal(expected, full)  # so a full cache would be seen
    model = wrap(inner)
    assert arkv_fx.transform(model, CONFIG, compile="eager") is model
    out = generate(model)
    assert isinstance(out.past_key_values, arkv_fx.ArkvCache)
    assert torch.equal(out.sequences, expected)
    assert model.arkv.report().fused == 2
    assert isinstance(arkv_fx.ArkvCache(model), arkv_fx.ArkvCache)
    assert arkv_fx.restore(model) is model and not hasattr(model, "arkv")
    again = generate(model)
    assert isinstance(again.past_key_values, DynamicCache)
    assert torch.equal(again.sequences, full)


def test_a_peft_model_is_seen_through() -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = peft.get_peft_model(random_model("llama"), adapter).eval()
    arkv_fx.transform(model, CONFIG, compile="eager")
    assert isinstance(generate(model).past_key_values, arkv_fx.ArkvCache)
    assert isinstance(model(ids()).past_key_values, arkv_fx.ArkvCache)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "LORA"])
def test_learned_prefixes_are_refused(kind: str) -> None:
    """PEFT hands them on as a cache that is full from the beginning."""
    model = WithValues(random_model("llama", num_hidden_layers=1))
    model.active_peft_config = SimpleNamespace(peft_type=kind)  # type: ignore[assignment]
    if kind == "LORA":
        assert arkv_fx.transform(model, CONFIG, compile="eager") is model
        return
    with pytest.raises(TransformError, match=r"adapter is of PREFIX_TUNING: .*LoRA"):
        arkv_fx.transform(model, CONFIG, compile="eager")
    assert not hasattr(model.inner, "arkv")


def test_of_two_models_nobody_can_tell_which() -> None:
    with pytest.raises(
        TransformError, match=r"inner \(Llama.*reference \(Llama.*transform the one"
    ):
        arkv_fx.transform(Two(random_model("llama")), CONFIG, compile="eager")


def test_a_wrapped_model_is_calibrated() -> None:
    model = WithValues(random_model("llama"))
    config = CONFIG.replace(calibration="normalised")
    calibration = arkv_fx.calibrate(model, ids(), config)
    arkv_fx.transform(model, config, calibration, compile="eager")
    assert isinstance(generate(model).past_key_values, arkv_fx.ArkvCache)


@pytest.mark.parametrize(
    "name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_continuous_batching_is_refused_by_name(name: str) -> None:
    model: Any = random_model("llama")
    if not hasattr(model, name):
        pytest.skip("not in this transformers")
    arkv_fx.transform(model, CONFIG, compile="eager")
    with pytest.raises(CacheError, match=rf"{name}\(\) keeps every token in a paged cache"):
        getattr(model, name)([[1, 2, 3]], generation_config=GenerationConfig())
    arkv_fx.restore(model)
    assert getattr(model, name).__func__ is getattr(type(model), name)


class PagedCache:
    """Like what continuous batching hands on: no Cache, but one all the same."""

    def update(self, *args: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize("name", ["kv_store", "cache_2030"])
@pytest.mark.parametrize("make", [DynamicCache, PagedCache])
def test_a_cache_by_any_other_name_is_refused(name: str, make: Any) -> None:
    model = arkv_fx.transform(random_model("llama"), CONFIG, compile="eager")
    with pytest.raises(CacheError, match=f"{name}= is a {make.__name__}, a cache that is not ours"):
        model(ids(), **{name: make()})


def test_an_empty_dynamic_cache_becomes_ours() -> None:
    model = arkv_fx.transform(random_model("llama"), CONFIG, compile="eager")
    expected = generate(model).sequences
    for made in (DynamicCache(), DynamicCache(config=model.config)):
        out = generate(model, past_key_values=made)
        assert out.past_key_values is made and isinstance(made, arkv_fx.ArkvCache)
        assert torch.equal(out.sequences, expected)
        turn = torch.cat([out.sequences, ids(5)], 1)  # the chat goes on with the same object
        assert model.generate(turn, past_key_values=made, max_new_tokens=2).shape[1] == 60 + NEW + 7
    cache = DynamicCache()
    model(ids(), past_key_values=cache)
    assert cache.get_seq_length() == 60


def test_a_cache_that_holds_something_or_is_of_another_kind_is_refused() -> None:
    model = random_model("llama")
    used = model(ids(), use_cache=True).past_key_values
    arkv_fx.transform(model, CONFIG, compile="eager")
    for cache in (used, StaticCache(config=model.config, max_cache_len=99)):
        with pytest.raises(CacheError, match=f"got a {type(cache).__name__}; pass ArkvCache"):
            model(ids(4), past_key_values=cache)


def test_a_part_of_a_model_is_served_through_the_whole() -> None:
    model = random_model("llama")
    arkv_fx.transform(model, CONFIG, compile="eager")
    expected = generate(model).sequences
    arkv_fx.restore(model)
    arkv_fx.transform(model.model, CONFIG, compile="eager")
    out = generate(model)
    assert isinstance(out.past_key_values, arkv_fx.ArkvCache)
    assert torch.equal(out.sequences, expected)


def test_drafts_are_refused_where_a_part_is_transformed() -> None:
    """Its cache was transformers' own when it was told that it would have to give tokens back."""
    model = random_model("llama", num_hidden_layers=1)
    helper = random_model("llama", num_hidden_layers=1, seed=3)
    arkv_fx.transform(model.model, CONFIG, compile="eager")
    for drafts in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": helper}):
        with pytest.raises(CacheError, match=r"LlamaModel is a part; .*transform on what generate"):
            generate(model, **drafts)
    assert isinstance(generate(model).past_key_values, arkv_fx.ArkvCache)


class OwnLoop(nn.Module):
    """A loop of its own around a model without a head, which makes the cache."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.head = base, nn.Linear(64, 128)

    @torch.no_grad()
    def talk(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        token, cache = input_ids, None
        for _ in range(NEW):
            out = self.base(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = self.head(out.last_hidden_state[:, -1:]).argmax(-1)
            input_ids = torch.cat([input_ids, token], 1)
        return input_ids, cache


def test_a_loop_of_its_own_around_a_base_model_runs_on_our_cache() -> None:
    torch.manual_seed(0)
    model = OwnLoop(random_model("llama").model)
    full, cache = model.talk(ids())
    assert isinstance(cache, DynamicCache)
    assert arkv_fx.transform(model, CONFIG.replace(budget=99), compile="eager") is model
    tokens, cache = model.talk(ids())
    assert isinstance(cache, arkv_fx.ArkvCache) and torch.equal(tokens, full)
    assert model.arkv.report().fused == 2
    arkv_fx.restore(model)
    assert isinstance(model.talk(ids())[1], DynamicCache)
    model.other = random_model("llama").model
    with pytest.raises(TransformError, match=r"keep a cache: base \(Llama.*other \(Llama"):
        arkv_fx.transform(model, CONFIG, compile="eager")


def test_dynamic_is_what_ours_stands_for() -> None:
    model = arkv_fx.transform(random_model("llama"), CONFIG, compile="eager")
    out = generate(model, cache_implementation="dynamic")
    assert isinstance(out.past_key_values, arkv_fx.ArkvCache)
    with pytest.raises(CacheError, match="cache_implementation='static'"):
        generate(model, cache_implementation="static")


def test_it_says_that_it_cannot_be_cropped() -> None:
    model = arkv_fx.transform(random_model("llama"), CONFIG, compile="eager")
    assert arkv_fx.ArkvCache(model).is_croppable is False


@pytest.mark.parametrize("compile", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_hooks_that_come_later_run(compile: str) -> None:
    model = arkv_fx.transform(random_model("llama"), CONFIG, compile=compile)
    before = generate(model).sequences
    seen: list[Tensor] = []
    watch = model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(out))
    assert torch.equal(generate(model).sequences, before)
    assert len(seen) == NEW
    watch.remove()
    generate(model)
    assert len(seen) == NEW
    steer = model.model.layers[1].register_forward_hook(lambda module, args, out: out * 0 + 1)
    assert not torch.equal(generate(model).sequences, before)
    steer.remove()
    assert torch.equal(generate(model).sequences, before)


def test_hooks_for_all_modules_that_come_later_run() -> None:
    """Dynamo guards none of these as long as there are none."""
    model = arkv_fx.transform(random_model("llama"), CONFIG, compile="eager")
    before = generate(model).sequences
    seen: list[str] = []
    layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]

    def note(word: str) -> Any:
        return lambda module, *args: seen.append(word) if module in layers else None

    watch = register_module_forward_hook(note("after"))
    assert torch.equal(generate(model).sequences, before)
    assert seen == ["after"] * 2 * NEW
    others = [
        register_module_forward_pre_hook(note("ahead")),
        register_module_forward_hook(note("last")),
    ]
    seen.clear()
    assert torch.equal(generate(model).sequences, before)
    assert seen == ["ahead", "after", "last"] * 2 * NEW
    for hook in (watch, *others):
        hook.remove()
    seen.clear()
    graphs = model.arkv.backend.graphs
    assert torch.equal(generate(model).sequences, before)
    assert not seen and model.arkv.backend.graphs == graphs


def test_chunks_that_would_cut_an_encoders_mask_are_refused() -> None:
    """transformers cuts it to the decoder's prompt, which then attends to padding."""
    model = tiny_model("t5:seq2seq")
    text, begun = torch.randint(2, 64, (2, 12)), torch.randint(2, 64, (2, 9))
    padded = torch.ones_like(text)
    padded[1, 10:] = 0
    settings = {"decoder_input_ids": begun, "max_new_tokens": 3, "do_sample": False}
    want = model.generate(text, **settings)
    arkv_fx.transform(
        model, arkv_fx.ArkvConfig(budget=64, window=8, tiers=("native",)), compile="eager"
    )
    assert torch.equal(model.generate(text, prefill_chunk_size=5, **settings), want)
    with pytest.raises(CacheError, match=r"prefill_chunk_size.*padding"):
        model.generate(text, attention_mask=padded, prefill_chunk_size=5, **settings)


def test_a_part_called_by_itself_says_what_it_keeps(recwarn: pytest.WarningsRecorder) -> None:
    """The model without its head, as loops of one's own and embedding scripts call it."""
    model: Any = arkv_fx.transform(random_model("llama"), CONFIG, compile="eager")
    generate(model)
    model.model(ids(), use_cache=False)
    assert not [w for w in recwarn if "called by itself" in str(w.message)]
    with pytest.warns(UserWarning, match=r"model \(LlamaModel\) .* itself and keeps a DynamicC"):
        assert isinstance(model.model(ids()).past_key_values, DynamicCache)
    arkv_fx.restore(model)
    assert not model.model._forward_hooks
    model.model(ids())
    assert len([w for w in recwarn if "called by itself" in str(w.message)]) == 0


def test_a_decoders_text_that_is_read_twice_is_warned_of() -> None:
    """Without its mask transformers reads what the cache of an encoder-decoder holds once more."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1}
    plain: Any = T5ForConditionalGeneration(
        T5Config(**sizes, num_heads=2, decoder_start_token_id=0)
    )
    source, text = torch.randint(2, 64, (1, 9)), torch.randint(2, 64, (1, 10))
    text[0, 0] = 0
    options: dict[str, Any] = {"decoder_input_ids": text, "max_new_tokens": 3, "do_sample": False}
    expected = plain.eval().generate(source, **options)
    roomy = arkv_fx.ArkvConfig(budget=64, tiers=("native",))
    model: Any = arkv_fx.transform(plain, roomy, compile="eager")
    for mask, seen in ((None, 21), (torch.ones_like(text), 12)):
        cache = new_cache(model)
        with torch.no_grad():
            model(input_ids=source, decoder_input_ids=text[:, :9], past_key_values=cache)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = model.generate(
                source, **options, past_key_values=cache, decoder_attention_mask=mask
            )
        found = [str(w.message) for w in said if "tokens of the decoder" in str(w.message)]
        assert cache.get_seq_length() == seen
        if mask is None:
            assert len(found) == 1 and "holds 9 tokens" in found[0] and "ones_like" in found[0]
        else:
            assert not found and torch.equal(out, expected)


def test_a_cache_from_before_a_second_transform_is_refused() -> None:
    """The first transform is gone, and what came after may lie where it lay."""
    model: Any = random_model("llama")
    for _ in range(4):
        cache = generate(arkv_fx.transform(model, CONFIG, compile="eager")).past_key_values
        arkv_fx.restore(model)
        gc.collect()
        arkv_fx.transform(model, CONFIG, compile="eager")
        with pytest.raises(CacheError, match="belongs to"), torch.no_grad():
            model(ids()[:, :1], past_key_values=cache)
        arkv_fx.restore(model)
