"""What a CUDA graph is, for tests without a GPU: the same operators over the same memory, again.

While it records nothing is computed: results are memory that holds NaN or nonsense, so a host that
reads them is found out. A launch runs every operator on the tensors and numbers of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Tape(TorchDispatchMode):
    """Records operators; those that look at numbers are refused, as CUDA does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if op in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        if op.is_view:
            return op(*args, **kwargs)
        written = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]
        if any(written):
            self.calls.append((op, args, kwargs, None))
            return args[written.index(True)] if op._schema.returns else None
        shapes = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        out = tree_map_only(Tensor, _garbage, op(*shapes[0], **shapes[1]))
        self.calls.append((op, args, kwargs, out))
        return out

    def launch(self) -> None:
        """Compute everything, where it was recorded."""
        for op, args, kwargs, out in self.calls:
            found = op(*args, **kwargs)
            if out is not None:
                for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def _garbage(like: Tensor) -> Tensor:
    new = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    return new.fill_(float("nan") if new.is_floating_point() else 1)


def record_tape(call: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """As ``arkv_fx.compile.replay.record_cuda``."""
    tape = Tape()
    with tape:
        out = call()
    return out, tape.launch
