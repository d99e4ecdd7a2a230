"""Every causal language model that transformers has, as a tiny one with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from arkv_fx.errors import ModelNotFoundError
from arkv_fx.zoo.shrink import shrink

_NAMES: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_RECURRENT = "its state is recurrent and of one size: there is no KV cache"
_TARGET = "a drafting assistant: it reads the cache of another model, and has none of its own"
NOT_CACHEABLE: dict[str, str] = {
    "falcon_mamba": _RECURRENT,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "rwkv": _RECURRENT,
    "xlstm": _RECURRENT,
    "openai-gpt": "transformers runs it without a cache",
    "xlm": "transformers' XLM keeps no cache of keys and values between calls",
    "xlnet": "it keeps hidden states (mems), not keys and values",
    "reformer": "it keeps hidden states and LSH buckets, not keys and values",
    "gemma4_assistant": _TARGET,
    "gemma4_unified_assistant": _TARGET,
}
"""Architectures that have no KV cache, each with the reason."""

_SHARED: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_GEMMA4: dict[str, Any] = {**_SHARED, "global_head_dim": 32}
_SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
}
_DOTS3: dict[str, Any] = {
    f"swa_{name}": size
    for name, size in {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "head_dim": 24,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }.items()
} | {"num_key_value_heads": 4, "head_dim": 24}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "cpmant": {"dim_head": 16, "dim_ff": 128},
    "ctrl": {"dff": 128},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    },
    "dots3_note_text": _DOTS3,
    "gemma3n_text": _SHARED,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"L_cycles": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "moshi": {"sliding_window": 512},  # its own cache has the window, its mask has not
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
        "shape_vocab_size": 128,
        "pronunciation_vocab_size": 128,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the names of the attributes do not tell: config values by architecture."""


def architectures() -> list[str]:
    """The model types that transformers lists as causal language models, sorted."""
    return sorted(_NAMES)


def tiny_config(name: str) -> PreTrainedConfig:
    """A tiny config of the architecture ``name``: of its decoder where that can stand alone.

    Raises:
        ModelNotFoundError: if transformers lists no such causal language model.
    """
    wanted = _model_class(name).config_class
    whole: PreTrainedConfig = CONFIG_MAPPING[name]()
    parts = [value for value in vars(whole).values() if isinstance(value, wanted)]
    config = whole if isinstance(whole, wanted) or not parts else parts[0]
    values = shrink(config, CHANGES.get(config.model_type))
    del values["model_type"]
    return type(config)(**values)


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The architecture ``name`` with two to six layers, hidden size 64 and random weights.

    A float32 model in eval mode that never stops early in ``generate()``. The same arguments give
    the same weights, and the global random state stays as it was.

    Raises:
        ModelNotFoundError: if transformers lists no such causal language model, or it cannot be
            built here.
    """
    kind = _model_class(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model: Any = kind._from_config(tiny_config(name), dtype=torch.float32)
        except (ImportError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ModelNotFoundError(f"{name} cannot be built: {error}") from error
    _spread(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ready: PreTrainedModel = model.eval()
    return ready


def _model_class(name: str) -> Any:
    if name not in _NAMES:
        raise ModelNotFoundError(
            f"transformers lists no causal language model {name!r}; `arkv zoo --list` names all"
        )
    return getattr(transformers, _NAMES[name])


def _spread(model: torch.nn.Module) -> None:
    """Make attention depend on its queries: normed ones ignore ``initializer_range``."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "q_layernorm.weight")):
            parameter.data += 2.0
