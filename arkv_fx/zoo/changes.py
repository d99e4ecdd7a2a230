"""Architectures that need more than the names of their attributes, and those without a cache."""

from __future__ import annotations

from typing import Any

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
_MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
}
_CROSS: dict[str, Any] = {"decoder": {"add_cross_attention": True}}
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
    "chameleon": {"vocabulary_map": {"<image>": 5}},
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
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "encoder-decoder": _CROSS,
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": {**_SHARED, "intermediate_size": 128},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"L_cycles": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _SLIDING,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
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
    "speech-encoder-decoder": _CROSS,
    "vision-encoder-decoder": _CROSS,
    **dict.fromkeys(
        (
            "glm4v_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "qwen2_5_vl_text",
            "qwen2_vl_text",
        ),
        _MROPE,
    ),
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the names of the attributes do not tell: config values by model type, parts included."""
