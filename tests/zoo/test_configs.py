"""The tiny models: what they hold, that they repeat, that nothing is left out in silence."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from arkv_fx.errors import ModelNotFoundError
from arkv_fx.zoo import drive
from arkv_fx.zoo.changes import CHANGES, NOT_CACHEABLE
from arkv_fx.zoo.configs import KINDS, LARGEST, architectures, tiny_config, tiny_model
from arkv_fx.zoo.shrink import SIZES

SINGLE = drive.batches()["single"]


def test_every_listed_name_is_an_architecture() -> None:
    known = architectures()
    assert known == sorted(set(known))
    assert {"llama", "bert", "gpt2", "mamba", "t5:seq2seq", "qwen2_vl:multimodal"} <= set(known)
    kinds = [architectures(kind) for kind in KINDS]
    assert sorted(chain(*kinds)) == known
    assert all(":" not in name for name in architectures("causal"))
    assert set(NOT_CACHEABLE) <= set(known)
    sizes = [name for names in SIZES.values() for name in names.split()]
    assert len(sizes) == len(set(sizes)), "one name has two sizes"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ModelNotFoundError, match="no language model 'llamma'"):
        tiny_model("llamma")


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1", "bert"])
def test_the_same_arguments_give_the_same_float32_weights(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = tiny_model(name), tiny_model(name), tiny_model(name, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    one, two, three = [drive.logits(m, SINGLE, drive.AT_ONCE, None) for m in (first, again, other)]
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("llama4_text", {"chunked_attention", "full_attention"}),
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("nemotron_h", {"linear_attention", "moe", "mlp", "full_attention"}),
        ("bamba", {"linear_attention", "full_attention"}),
    ],
)
def test_a_layer_of_each_kind_is_kept(name: str, kinds: set[str]) -> None:
    config = tiny_config(name)
    assert set(config.layer_types) == kinds
    assert len(config.layer_types) == config.num_hidden_layers <= 6


def test_layers_that_share_keys_are_kept() -> None:
    config = tiny_config("gemma3n_text")
    assert 0 < config.num_kv_shared_layers < config.num_hidden_layers


def test_the_decoder_of_a_larger_model_stands_alone() -> None:
    assert tiny_config("qwen4_exp").model_type == "qwen4_exp_text"
    assert tiny_config("musicgen").model_type == "musicgen_decoder"


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures())
def test_every_architecture_is_small_or_says_why_not(name: str) -> None:
    if name in NOT_CACHEABLE:
        assert len(NOT_CACHEABLE[name]) > 20
        return
    try:
        model = tiny_model(name)
    except ModelNotFoundError as error:
        assert name in str(error)
        return
    assert sum(p.numel() for p in model.parameters()) <= LARGEST


def test_changes_are_of_model_types_that_there_are() -> None:
    unknown = set(CHANGES) - set(CONFIG_MAPPING)
    if Version(transformers.__version__) < Version("5.23"):
        unknown -= {"dots3_note_text", "molmo2"}  # newer than some versions that we support
    assert not unknown


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "rwkv", "xlnet", "openai-gpt"])
def test_what_is_said_to_have_no_cache_keeps_no_keys(name: str) -> None:
    model = tiny_model(name)
    try:
        cache = drive.own_cache(model)
        drive.logits(model, SINGLE, drive.AT_ONCE, cache)
    except (TypeError, ValueError, AttributeError):
        return  # it does not even take one
    assert not any(getattr(layer, "keys", None) is not None for layer in cache.layers)
