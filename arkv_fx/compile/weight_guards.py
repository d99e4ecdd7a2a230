"""Whether weights made of several tensors are still those that a graph was compiled for, cheaply.

Dynamo asks each of them for its metadata, in Python, and looks at each of its tensors in every
call: of a model of 211 quantized layers that takes two milliseconds a step. Its guards on what
torchao's weights are made of are left out here, and a weight that is another object than before is
compared with what it replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from arkv_fx.errors import TransformError
from arkv_fx.weights.stored import is_torchao


def lean_guards(entries: Sequence[Any]) -> list[bool]:
    """Dynamo's ``guard_filter_fn``: all guards but those on the insides of torchao's weights."""
    weights = {e.name for e in entries if e.guard_type == "TENSOR_MATCH" and is_torchao(e.value)}
    return [not _inside(entry, weights) for entry in entries]


def _inside(entry: Any, weights: set[str]) -> bool:
    if entry.guard_type == "TENSOR_SUBCLASS_METADATA_MATCH":
        return entry.name in weights
    return entry.name.rpartition(".")[0] in weights  # its tensors, and `__tensor_flatten__()[0]`


def tensor_form(x: Tensor) -> Any:
    """All of a tensor that its code depends on; of one that is made of others, theirs too."""
    sizes = tuple(map(str, x.shape)), tuple(map(str, x.stride()))
    form = (x.dtype, str(x.device), *sizes, x.requires_grad)
    if not is_traceable_wrapper_subclass(x):
        return form
    names, rest = x.__tensor_flatten__()
    parts = tuple((name, tensor_form(getattr(x, name))) for name in names)
    return (*form, type(x), parts, repr(rest))


class SameWeights:
    """The torchao weights among a graph's inputs.

    Args:
        inputs: those that the graph was compiled for.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.known = [
            (i, weakref.ref(x), tensor_form(x)) for i, x in enumerate(inputs) if is_torchao(x)
        ]

    def check(self, inputs: Sequence[Any]) -> None:
        """Look at the inputs of a call.

        Raises:
            TransformError: if a weight was replaced by one that is made otherwise.
        """
        for at, (i, weight, form) in enumerate(self.known):
            x = inputs[i]
            if x is weight():
                continue
            if tensor_form(x) != form:
                raise TransformError(
                    f"a quantized weight {list(x.shape)} is made otherwise than the one that was "
                    "there when the model was compiled: call arkv_fx.restore(model), then "
                    "transform it again"
                )
            self.known[at] = (i, weakref.ref(x), form)
