"""``linear``: a model's linear layers as rewritten graphs run them and as torch does, by rows.

With ``weights`` quantized ones, too, as ours, torchao and torch multiply them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.bench.cases import Options
from arkv_fx.evaluation.bench.contest import Entrant, compete
from arkv_fx.evaluation.bench.measurements import Measurement, dtype_name
from arkv_fx.evaluation.bench.quantized_layers import WAYS, nbytes, products, quantized
from arkv_fx.evaluation.bench.timing import cache_bytes
from arkv_fx.kernels.cpp.linear_operator import few_rows, multiplied_by_torch
from arkv_fx.models import skeleton

ROWS = (1, 4, 16, 512)
Form = Callable[[Tensor, Tensor], object]


def linear_layers(options: Options, progress: Callable[[str], None]) -> list[Measurement]:
    """Random weights of the model's shapes, more of them than the last-level cache holds."""
    shapes = _shapes(options.model)
    weights: list[Tensor] = []
    while sum(w.nbytes for w in weights) < 2 * cache_bytes(options.device):
        weights += [torch.randn(shape).to(options.dtype) for shape in shapes]
    progress(f"{len(weights)} weights")
    others = {kind: quantized(weights, kind) for kind in options.weights}
    rows = []
    for count in ROWS:
        some = weights if count <= 16 else weights[: len(shapes)]
        inputs = {w.shape[1]: torch.randn(count, w.shape[1]).to(options.dtype) for w in some}
        empty = Measurement(
            "linear", options.model, "torch", dtype_name(options.dtype), context=count,
            bytes=sum(w.nbytes for w in some),
        )  # fmt: skip
        name, form = _ours(options.dtype, count)
        entrants = [Entrant(replace(empty, method=name), _over(some, inputs, form))]
        entrants.append(Entrant(empty, _over(some, inputs, linear)))
        for kind, made in others.items():
            few = made[: len(some)]
            row = replace(empty, bytes=nbytes(few))
            entrants += [
                Entrant(replace(row, method=name), _over(few, inputs, form))
                for name, form in products(kind).items()
            ]
        ours, torchs, *rest = compete(entrants, options, progress)
        rows += [ours.against([torchs]), torchs]
        for first in range(0, len(rest), WAYS):  # of one kind, ours first
            mine, *rivals = rest[first : first + WAYS]
            rows += [mine.against([torchs, *rivals]), *rivals]
    return rows


def _over(weights: list[Tensor], inputs: dict[int, Tensor], form: Form) -> Callable[[], None]:
    def run() -> None:
        for weight in weights:
            form(inputs[weight.shape[1]], weight)

    return run


def _ours(dtype: torch.dtype, rows: int) -> tuple[str, Form]:
    """What ``compile.fast_linear`` puts in a layer's place; calls are not joined here."""
    if rows <= few_rows(dtype):
        return "arkv", lambda x, w: torch.ops.arkv_cpu.linear(x, [w], [])
    if not multiplied_by_torch(dtype):
        return "arkv in float32", lambda x, w: torch.ops.arkv_cpu.linear_in_float32(x, w, None)
    return "arkv, left to torch", linear


def _shapes(model: str) -> list[torch.Size]:
    """Of the linear layers in the first of a model's repeated blocks.

    Raises:
        EvaluationError: if it has none.
    """
    for module in skeleton(model).modules():
        if isinstance(module, nn.ModuleList) and len(module):
            found = [m.weight.shape for m in module[0].modules() if isinstance(m, nn.Linear)]
            if found:
                return found
    raise EvaluationError(f"{model} has no linear layers in blocks")
