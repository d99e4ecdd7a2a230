"""Every language model that transformers has, as a tiny one with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from arkv_fx.errors import ModelNotFoundError
from arkv_fx.zoo.changes import CHANGES
from arkv_fx.zoo.shrink import shrink

KINDS: dict[str, Mapping[str, str]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "multimodal": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
"""transformers' lists of language models: class by model type."""

LARGEST = 100_000_000  # parameters: what no attribute shrinks would only cost time and memory


def _class_names() -> dict[str, str]:
    """Class names by architecture. A class that two lists have is of the first."""
    found: dict[str, str] = {}
    for kind, classes in KINDS.items():
        before = set(found.values())
        for name, class_name in classes.items():
            if class_name not in before:
                found[name if kind == "causal" else f"{name}:{kind}"] = class_name
    return dict(sorted(found.items()))


_CLASSES = _class_names()


def architectures(kind: str | None = None) -> list[str]:
    """Names of all architectures, or of those of one of ``KINDS``, sorted.

    A causal language model has the name of its model type; others have their kind behind it, as
    in ``t5:seq2seq``.
    """
    return [name for name in _CLASSES if kind is None or kind_of(name) == kind]


def kind_of(name: str) -> str:
    """Which of ``KINDS`` an architecture is of."""
    return name.partition(":")[2] or "causal"


def tiny_config(name: str) -> PreTrainedConfig:
    """A tiny config of the architecture ``name``: of its decoder where that can stand alone.

    Raises:
        ModelNotFoundError: if transformers lists no such language model.
    """
    wanted = _model_class(name).config_class
    try:
        whole: PreTrainedConfig = CONFIG_MAPPING[name.partition(":")[0]]()
    except StrictDataclassError:  # transformers 5.17 makes no Musicgen without its text encoder
        whole = wanted()
    parts = [value for value in vars(whole).values() if isinstance(value, wanted)]
    config = whole if isinstance(whole, wanted) or not parts else parts[0]
    values = shrink(config, CHANGES)
    del values["model_type"]
    return type(config)(**values)


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The architecture ``name`` with two to six layers, hidden size 64 and random weights.

    A float32 model in eval mode that never stops early in ``generate()``. The same arguments give
    the same weights, and the global random state stays as it was.

    Raises:
        ModelNotFoundError: if transformers lists no such language model, or it cannot be built
            here.
    """
    kind = _model_class(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            config = tiny_config(name)
            with torch.device("meta"):
                size = sum(p.numel() for p in kind._from_config(config).parameters())
            if size > LARGEST:
                raise ValueError(f"it has {size / 1e6:.0f} million parameters after shrinking")
            model: Any = kind._from_config(tiny_config(name), dtype=torch.float32)
        except Exception as error:  # there is no end to what a config may refuse
            raise ModelNotFoundError(f"{name} cannot be built: {error}") from error
    _spread(model)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.update(eos_token_id=None, pad_token_id=0, decoder_start_token_id=1)
    ready: PreTrainedModel = model.eval()
    return ready


def _model_class(name: str) -> Any:
    if name not in _CLASSES:
        raise ModelNotFoundError(
            f"transformers lists no language model {name!r}; `arkv zoo --list` names all"
        )
    return getattr(transformers, _CLASSES[name])


def _spread(model: torch.nn.Module) -> None:
    """Make attention depend on its queries: normed ones ignore ``initializer_range``."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "q_layernorm.weight")):
            parameter.data += 2.0
