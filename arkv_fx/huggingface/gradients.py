"""Whether a call is differentiated, and what says so where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from arkv_fx.errors import CacheError, TransformError


def is_differentiated(given: Iterable[Any], parameters: Iterable[Tensor]) -> bool:
    """Whether gradients are on, and wanted of what is given or of the parameters."""
    if not torch.is_grad_enabled():
        return False
    found = any(isinstance(x, Tensor) and x.requires_grad for x in given)
    return found or any(p.requires_grad for p in parameters)


def without_backward(out: Any) -> Any:
    """An output of a call with a cache, whose numbers say why they have no gradient when asked."""
    start = torch.empty(0, requires_grad=True)
    refuse: Callable[[Tensor, Tensor], Tensor] = _NoBackward.apply
    return tree_map_only(Tensor, lambda x: refuse(x, start) if x.is_floating_point() else x, out)


def refuse_int4_backward(out: Any) -> None:
    """Let a call's output say, when its gradient is asked for, that int4 weights have none."""

    def refuse(gradient: Tensor) -> NoReturn:
        raise TransformError(
            "backward() through int4 weights: torch has no derivative of their product; call under "
            "torch.no_grad(), or use weights='int8'"
        )

    for x in tree_leaves(out):
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(refuse)


class _NoBackward(torch.autograd.Function):
    """Hands numbers on, and refuses their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise CacheError(
            "backward() of a call with a cache: the cache is not differentiated. Call the model "
            "with use_cache=False, or name neither a cache nor use_cache"
        )
