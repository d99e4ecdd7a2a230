"""Which model is meant where another module wraps it."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from arkv_fx.errors import TransformError
from arkv_fx.huggingface.model_caches import CACHE_NAMES, only_looks_ahead

# Kinds of PEFT adapters that are caches.
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


def generating_part(model: nn.Module) -> nn.Module:
    """The model whose cache grows: ``model`` itself, or the one that it wraps.

    Seen through are PEFT and value-head models, modules of ``torch.compile`` and whatever else
    holds one transformers model that generates, or one without a head that keeps a cache (which a
    loop of the wrapper's own calls).

    Raises:
        TransformError: if it holds several, so that nobody can tell which is meant; or if it is a
            PEFT model whose adapter makes keys and values of its own.
    """
    if isinstance(model, PreTrainedModel):
        return model
    adapter = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if (kind := getattr(adapter, "value", adapter)) in PREFIXES:
        raise TransformError(
            f"the active adapter is of {kind}: PEFT begins each text with a DynamicCache of keys "
            "and values that it learned, where ours takes tokens only; use another adapter (LoRA "
            "and prompt tuning work), or leave the model as it is"
        )
    for kind, wanted in (("generate", _generates), ("keep a cache", _keeps_cache)):
        found: list[tuple[str, nn.Module]] = []
        for path, module in model.named_modules():
            inside = any(path.startswith(f"{outer}.") for outer, _ in found)
            if isinstance(module, PreTrainedModel) and wanted(module) and not inside:
                found.append((path, module))
        if len(found) > 1:
            names = ", ".join(f"{path} ({type(module).__name__})" for path, module in found)
            raise TransformError(
                f"{type(model).__name__} holds several models that {kind}: {names}; transform the "
                "one whose cache is to be small"
            )
        if found:
            return found[0][1]
    return model


def _generates(model: PreTrainedModel) -> bool:
    return bool(model.can_generate())


def _keeps_cache(model: PreTrainedModel) -> bool:
    """Whether a model is a decoder that takes a cache, and so makes one where none is given."""
    taken = inspect.signature(model.forward).parameters
    return any(name in taken for name in CACHE_NAMES) and not only_looks_ahead(model)
