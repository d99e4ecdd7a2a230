"""Any transformers config made tiny, by the names of its attributes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeGuard

from transformers import PreTrainedConfig

SIZES: dict[int, str] = {
    0: "num_mtp_layers num_nextn_predict_layers",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts",
    2: (
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk "
        "moe_k top_k_experts zero_expert_num linear_num_key_heads "
        "first_k_dense_replace"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads "
        "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads"
    ),
    8: "qk_rope_head_dim mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size",
    16: (
        "head_dim kv_channels swa_head_dim v_head_dim qk_nope_head_dim d_kv index_head_dim "
        "index_topk linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim "
        "hidden_size_per_layer_input laurel_rank sliding_window_size window_size local_attention "
        "attention_window_size attention_chunk_size rotary_dim index_n_heads"
    ),
    32: (
        "kv_lora_rank q_lora_rank moe_intermediate_size shared_expert_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size image_size"
    ),
    64: (
        "hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size "
        "input_embedding_size output_embedding_size lru_width embed_dim hidden_dim projection_dim "
        "out_hidden_size text_hidden_size audio_hidden_size cross_hidden_size output_proj_dims "
        "adapter_in_dim adapter_out_dim adapter_input_size cross_attention_hidden_size"
    ),
    128: (
        "vocab_size vocab_size_per_layer_input decoder_vocab_size intermediate_size ffn_dim "
        "decoder_ffn_dim encoder_ffn_dim ffn_hidden_size feed_forward_size "
        "dense_intermediate_size intermediate_size_mlp d_inner shared_intermediate_size d_ff "
        "mamba_d_ssm"
    ),
    512: "max_position_embeddings n_positions max_seq_len max_target_positions",
}
"""Attribute names by the size they get: large enough to be distinct, small enough to be quick."""

ALWAYS: dict[str, Any] = {
    "initializer_range": 0.3,  # large, so that attention is far from uniform
    "init_std": 0.3,
    "tie_word_embeddings": False,  # tied, some only repeat the last token
    "is_decoder": True,  # encoders are causal, and have a cache, only then
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_encoder_layers", "num_decoder_layers", "depth",
)  # fmt: skip
_SIZE = {name: size for size, names in SIZES.items() for name in names.split()}


def shrink(
    config: PreTrainedConfig, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Keyword arguments that make a tiny config of ``config``'s class.

    ``config`` is one with default values: a layer of each kind that it has is kept, and what it
    switches off stays off. ``changes`` are values by model type, which come last; a mapping in
    them changes the part (text decoder, image encoder) of that name.
    """
    changes = changes or {}
    kept = _one_of_each_kind(config)
    small: dict[str, Any] = {"model_type": config.model_type}
    for name in inspect.signature(type(config).__init__).parameters:
        value: Any = vars(config).get(name)
        if isinstance(value, PreTrainedConfig):
            small[name] = shrink(value, changes)
        elif name in LAYERS:
            small[name] = len(kept)
        elif name in ALWAYS:
            small[name] = ALWAYS[name]
        elif name == "sliding_window":
            small[name] = None if value is None else 16
        elif name in _SIZE:
            small[name] = _like(value, _SIZE[name], config, len(kept))
        elif _per_layer(config, value):
            small[name] = [value[i] for i in kept]
    if "kv_lora_rank" in small:  # latent keys are expanded to all heads
        small["num_key_value_heads"] = small["num_attention_heads"]
    rope = vars(config).get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:  # its parts make half a head
        half = int(8 * rope.get("partial_rotary_factor", 1))
        part = half * 3 // 8
        small["rope_parameters"] = {**rope, "mrope_section": [half - 2 * part, part, part]}
    for name, value in changes.get(config.model_type, {}).items():
        if isinstance(small.get(name), dict) and isinstance(value, Mapping):
            value = {**small[name], **value}
        small[name] = value
    return small


def _like(value: Any, size: int, config: PreTrainedConfig, layers: int) -> Any:
    """``size`` in the form of ``value``: what is off or single stays so, a list remains one."""
    if isinstance(value, list | tuple):
        return [size] * (layers if len(value) == _layers(config) else len(value))
    return value if value in (0, 1) else size


def _one_of_each_kind(config: PreTrainedConfig) -> list[int]:
    """The first layer of each kind, as a config's lists of one value a layer tell them apart."""
    lists = [value for value in vars(config).values() if _per_layer(config, value)]
    first: dict[Any, int] = {}
    for i in range(_layers(config)):
        first.setdefault(tuple(value[i] for value in lists), i)
    return list(first.values()) if len(first) > 1 else [0, 1]


def _per_layer(config: PreTrainedConfig, value: Any) -> TypeGuard[list[Any]]:
    """Whether ``value`` tells kinds of layers apart: names, or switches."""
    return (
        isinstance(value, list | tuple)
        and len(value) == _layers(config) > 3
        and all(isinstance(x, str) or x in (0, 1) for x in value)
    )


def _layers(config: PreTrainedConfig) -> int:
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return int(vars(config).get(name) or 0)
