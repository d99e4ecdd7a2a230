"""A model's linear layers with weights in few bits, made by torchao, and the way back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from arkv_fx.errors import TransformError
from arkv_fx.options import refuse
from arkv_fx.weights.stored import is_torchao

WEIGHTS = ("int8", "int4")
"""int8: a scale a row, symmetric. int4: a scale and a zero of each 32 columns, two codes a byte."""

GROUP = 32
"""Columns that share a scale in int4: torchao's finest, and what divides most widths."""

ROWS = 16
"""torch packs int4 weights of whole sixteens of rows only."""

INSTALL = "pip install -c constraints.txt 'arkv-fx[weights]'"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Quantized:
    """What became of a model's linear layers: how many in which kind, and the originals if kept."""

    kind: str
    counts: dict[str, int] = field(default_factory=dict)
    originals: list[tuple[nn.Module, Tensor, dict[str, Any]]] | None = None

    def note(self) -> str:
        """A line for the report."""
        layers = ", ".join(f"{n} {kind}" for kind, n in self.counts.items())
        kept = "kept beside them" if self.originals is not None else "not kept"
        return f"weights of linear layers by torchao: {layers}; the originals are {kept}"

    def restore(self) -> None:
        """The original weights, the same objects; warns if they are gone."""
        if self.originals is None:
            warnings.warn(
                f"the linear layers keep their {self.kind} weights: the originals were not kept "
                "(keep_weights=False); load the model again for them",
                UserWarning,
                stacklevel=3,
            )
            return
        for layer, weight, rest in self.originals:
            layer.weight = weight
            layer.__dict__.pop("extra_repr", None)
            layer.__dict__.update(rest)


def quantize(model: nn.Module, kind: str, keep: bool) -> Quantized:
    """Replace the weights of all linear layers by torchao's of ``kind``, one of ``WEIGHTS``.

    Embeddings stay. A head that is tied to one gets a weight of its own. Heads, and layers whose
    shape int4 cannot hold, are int8 in an int4 model.

    Raises:
        ConfigError: for another kind.
        TransformError: without torchao; or if there is nothing to quantize, a weight is quantized
            or sharded already, has no numbers yet, or lies where int4 is not packed.
    """
    if kind not in WEIGHTS:
        refuse("weights", kind, f"one of {', '.join(map(repr, WEIGHTS))}, or None")
    layers = list(_layers(model))
    if not layers:
        raise TransformError(
            f"weights={kind!r}: {type(model).__name__} has no torch.nn.Linear; leave weights out"
        )
    for path, layer in layers:
        _require_plain(path, layer.weight, kind)
    configs = _configs(kind)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    done = Quantized(kind, dict.fromkeys(configs, 0), [] if keep else None)
    shared: dict[int, Any] = {}  # of linear layers that have one weight together
    for _, layer in layers:
        original = layer.weight
        fits = original.shape[1] % GROUP == 0 and original.shape[0] % ROWS == 0
        chosen = kind if layer is not head and fits else "int8"
        if done.originals is not None:
            rest = {k: v for k, v in layer.__dict__.items() if k == "extra_repr"}
            done.originals.append((layer, original, rest))
        if id(original) in shared:
            layer.weight = shared[id(original)][1]
        else:
            _quantize(layer, configs[chosen])
            if _is_shared(original, layers):
                shared[id(original)] = original, layer.weight
        done.counts[chosen] += 1
    done.counts = {kind: n for kind, n in done.counts.items() if n}
    return done


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear))


def _is_shared(weight: Tensor, layers: list[tuple[str, nn.Linear]]) -> bool:
    return any(layer.weight is weight for _, layer in layers)


def _require_plain(path: str, weight: Tensor, kind: str) -> None:
    what = f"weights={kind!r}: {path or 'the model'}.weight"
    if is_torchao(weight):
        raise TransformError(
            f"{what} is quantized already ({type(weight).__name__}): leave weights out, and it is "
            "taken as it is"
        )
    if is_traceable_wrapper_subclass(weight):
        raise TransformError(
            f"{what} is a {type(weight).__name__}, as tensor parallelism has them: only whole "
            "weights are quantized here; quantize before sharding, or leave weights out"
        )
    if weight.dtype not in FLOATS:
        raise TransformError(
            f"{what} is in {weight.dtype}, so it is quantized already, or no float"
        )
    if weight.is_meta or isinstance(weight, FakeTensor):
        raise TransformError(f"{what} has no numbers yet: load the model first")
    if kind == "int4" and weight.device.type != "cpu":
        raise TransformError(
            f"{what} is on {weight.device}: int4 weights are packed for CPUs here; use "
            "weights='int8', or quantize with torchao for that device and leave weights out"
        )


def _configs(kind: str) -> dict[str, Any]:
    """torchao's configurations, ``kind`` first.

    Of its int4 forms (0.18) ``Int4WeightOnlyConfig`` packs for GPUs and NPUs only, or needs mslk,
    and ``IntxWeightOnlyConfig`` takes a byte a weight; the prototype has two codes in a byte and
    runs on any CPU. None may change Inductor's settings for the whole process.
    """
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise TransformError(f"weights={kind!r} needs torchao 0.18 ({error}): {INSTALL}") from error
    made = {"int8": Int8WeightOnlyConfig(set_inductor_config=False)}
    if kind == "int4":
        int4 = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
        made = {"int4": int4, **made}
    return made


def _quantize(layer: nn.Linear, config: Any) -> None:
    from torchao.quantization import quantize_

    with torch.no_grad():
        quantize_(layer, config, filter_fn=lambda module, _: module is layer)
