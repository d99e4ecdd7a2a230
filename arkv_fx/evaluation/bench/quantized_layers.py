"""Products with weights that torchao quantized: ours, torchao's own, and torch's own operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from arkv_fx.calibration import tensors_inside
from arkv_fx.compile.linear_forms import form_of
from arkv_fx.weights.quantizing import GROUP, quantize

WAYS = 3
"""In which each kind is multiplied, see ``products``."""

Product = Callable[[Tensor, Tensor], object]


def quantized(weights: Sequence[Tensor], kind: str) -> list[Tensor]:
    """The weights [N, K] as ``arkv_fx.transform(model, weights=kind)`` makes them."""
    layers: list[nn.Linear] = []
    for weight in weights:
        layers.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
        layers[-1].weight = nn.Parameter(weight, requires_grad=False)
    quantize(nn.ModuleList(layers), kind, keep=False)
    return [layer.weight for layer in layers]


def nbytes(weights: Sequence[Tensor]) -> int:
    """What they take, scales included."""
    return sum(plain.nbytes for weight in weights for plain in tensors_inside(weight))


def products(kind: str) -> Mapping[str, Product]:
    """Every way by name, ours first. Torch's operators take what torchao made, int8 scales in the
    rows' dtype; what a machine lacks fails when it is called."""
    name, call = TORCHS[kind]
    return {f"arkv {kind}": _ours, f"torchao {kind}": linear, name: call}


def _ours(x: Tensor, weight: Tensor) -> object:
    """What ``compile.fast_linear`` puts in a layer's place; calls are not joined here."""
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    form = form_of(x, weight, None, out)
    rows = x.shape[:-1].numel()
    if form is None or (rows > form.rows and form.many is None):
        return linear(x, weight)
    parts = [None if part is None else getattr(weight, part) for part in form.parts]
    if rows <= form.rows:
        lists = [[] if part is None else [part] for part in parts]
        return form.few(x, *lists, [], *form.rest)
    return form.many(x, *parts, None, *form.rest)


def _int8pack(x: Tensor, weight: Tensor) -> object:
    held: dict[str, Tensor] = vars(weight)
    if "in_dtype" not in held:  # once: models would keep them so
        held["in_dtype"] = held["scale"].flatten().to(x.dtype)
    return torch.ops.aten._weight_int8pack_mm(x, held["qdata"], held["in_dtype"])


def _int4pack(x: Tensor, weight: Tensor) -> object:
    held: dict[str, Tensor] = vars(weight)
    pack = torch.ops.aten._weight_int4pack_mm_for_cpu
    return pack(x, held["qdata"], GROUP, held["scale_and_zero"])


TORCHS: Mapping[str, tuple[str, Product]] = {
    "int8": ("_weight_int8pack_mm", _int8pack),
    "int4": ("_weight_int4pack_mm_for_cpu", _int4pack),
}
