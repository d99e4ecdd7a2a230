"""Architectures that the fuzzer draws from, each with the shapes that it may take."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from arkv_fx.zoo.changes import CHANGES
from arkv_fx.zoo.shrink import shrink

HEADS = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (5, 5), (6, 2), (6, 3))  # of queries, of keys
DIMS = (8, 16, 24, 32, 40, 64, 80, 96)
SOURCE, HIDDEN = 12, 64  # tokens of an encoder's answer, and its width
WIDTH = 120  # some models want a width that their heads divide, others one in eights

Settings = dict[str, Any]


def _grouped(rng: Random) -> Settings:
    """A width of the heads' own, and queries that share keys."""
    heads, kv_heads = rng.choice(HEADS)
    return {
        "hidden_size": WIDTH, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": rng.choice(DIMS),
    }  # fmt: skip


def _sliding(rng: Random) -> Settings:
    return {**_grouped(rng), "sliding_window": rng.choice((4, 9, 16, 24))}


def _mixed(rng: Random) -> Settings:
    """A layer that slides and one that does not."""
    kinds = ["sliding_attention", "full_attention"]
    return {**_sliding(rng), "layer_types": rng.sample(kinds, 2)}


def _split(width: str, number: str, **more: Any) -> Callable[[Random], Settings]:
    """Heads that share the model's width among them."""

    def settings(rng: Random) -> Settings:
        heads, dim = rng.choice((1, 2, 3, 5)), rng.choice(DIMS)
        return {width: heads * dim, number: heads, **more}

    return settings


def _opt(rng: Random) -> Settings:
    settings = _split("hidden_size", "num_attention_heads")(rng)
    return {**settings, "word_embed_proj_dim": settings["hidden_size"]}


def _falcon(rng: Random) -> Settings:
    settings = _split("hidden_size", "num_attention_heads", alibi=rng.random() < 0.4)(rng)
    several = rng.random() < 0.5
    return {**settings, "multi_query": not several, "new_decoder_architecture": False}


def _latent(rng: Random) -> Settings:
    """Keys of another dimension than values; one head is left alone where a text begins with one
    token, which the report says.
    """
    heads, rotary = rng.choice((2, 3, 4)), rng.choice((8, 16))
    return {
        "num_attention_heads": heads, "num_key_value_heads": heads, "first_k_dense_replace": 1,
        "qk_rope_head_dim": rotary, "qk_nope_head_dim": rng.choice((8, 16, 32)),
        "head_dim": rotary, "v_head_dim": rng.choice((8, 24, 40)),
        "kv_lora_rank": rng.choice((16, 32)), "q_lora_rank": rng.choice((None, 32)),
    }  # fmt: skip


def _t5(rng: Random) -> Settings:
    return {"num_heads": rng.choice((1, 2, 4)), "d_kv": rng.choice(DIMS)}


ARCHITECTURES: dict[str, Callable[[Random], Settings]] = {
    "llama": _grouped,
    "mistral": _sliding,
    "qwen2": _grouped,
    "qwen3": _grouped,
    "gemma2": _mixed,
    "gemma3_text": _mixed,
    "phi3": _sliding,
    "mixtral": _grouped,
    "qwen3_moe": _grouped,
    "gpt_oss": _mixed,
    "olmo2": _grouped,
    "cohere": _grouped,
    "granite": _grouped,
    "gpt2": _split("n_embd", "n_head"),
    "gptj": _split("n_embd", "n_head", rotary_dim=8),
    "gpt_neo": _split("hidden_size", "num_heads", attention_types=[[["global", "local"], 1]]),
    "gpt_neox": _split("hidden_size", "num_attention_heads"),
    "opt": _opt,
    "falcon": _falcon,
    "bloom": _split("hidden_size", "n_head"),
    "deepseek_v3": _latent,
    "t5": _t5,
    "bart": lambda rng: {
        "d_model": HIDDEN,
        "decoder_attention_heads": rng.choice((1, 2, 4)),
        "encoder_attention_heads": 1,
    },
}
"""Settings by model type; others than these are those of ``arkv zoo``."""

NO_SDPA = ("bloom", "gptj", "gpt_neo", "gpt_oss")
ENCODERS = ("t5", "bart")  # those with an encoder, whose answer is made up
START = 1  # with which their decoders begin: generate() puts it in front of other texts


def build(
    architecture: str, settings: Settings, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """A tiny model in eval mode with weights that are always the same."""
    kind = CONFIG_MAPPING[architecture]
    values = {**shrink(kind(), CHANGES), **settings}
    del values["model_type"]
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    auto: Any = AutoModelForSeq2SeqLM if architecture in ENCODERS else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = kind(**values)
        if architecture in NO_SDPA:
            attention = "eager"
        model: Any = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "q_layernorm.weight")):
            parameter.data += 2.0  # normed queries ignore the size of the weights
    model.generation_config.update(eos_token_id=None, pad_token_id=0, decoder_start_token_id=START)
    model.generation_config.update(forced_bos_token_id=None, forced_eos_token_id=None)
    ready: PreTrainedModel = model.to(dtype).eval()
    return ready
