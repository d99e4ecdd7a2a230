"""What torchao's weights are made of, as far as our kernels read them; torchao is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A weight [N, K] of a linear layer whose tensors can be read where they lie.

    Args:
        kind: "int8": codes int8 [N, K], scales [N, groups] or one, zero points int8 or None;
            "int4": codes as torch packs them on a CPU, [groups, N, 2] scales and values of code 8.
        parts: the attributes that hold them, in this order.
        groups: how many scales a row has.
    """

    kind: Literal["int8", "int4"]
    parts: tuple[str | None, ...]
    groups: int


def is_torchao(weight: Any) -> bool:
    """Whether a tensor is of one of torchao's classes."""
    return any(cls.__module__.split(".")[0] == "torchao" for cls in type(weight).__mro__)


def stored(weight: Any) -> Stored | None:
    """How a weight is stored; None if it is no torchao weight, or in a form that nobody here reads.

    Such are those whose products quantize or scale the activations as well, and blocks of several
    rows. What is asked for here is metadata, so fake tensors will do.
    """
    if not is_torchao(weight) or weight.dim() != 2:
        return None
    block = tuple(getattr(weight, "block_size", ()))
    rows, columns = weight.shape
    name = type(weight).__name__
    if getattr(weight, "act_pre_scale", None) is not None:
        return None
    by_rows = len(block) == 2 and block[0] == 1 and block[1] > 0 and columns % block[1] == 0
    groups = columns // block[1] if by_rows else 1
    if name == "Int8Tensor" and weight.act_quant_kwargs is None:
        # Zero points of whole rows are left out by torchao's own product, too.
        zeros = "zero_point" if groups > 1 and weight.zero_point is not None else None
        if by_rows or block == (rows, columns):
            return Stored("int8", ("qdata", "scale", zeros), groups)
    if name == "IntxUnpackedToInt8Tensor" and weight.activation_quantization is None:
        if by_rows and not weight.zero_point.is_floating_point():
            return Stored("int8", ("qdata", "scale", "zero_point"), groups)
    if name == "Int4OpaqueTensor" and weight.act_mapping_type is None and by_rows:
        return Stored("int4", ("qdata", "scale_and_zero"), groups)
    return None


def tensors_of(weight: Tensor, held: Stored) -> list[Tensor]:
    """The tensors that ``held.parts`` names."""
    return [getattr(weight, name) for name in held.parts if name is not None]
