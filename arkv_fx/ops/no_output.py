"""A prefill whose output nobody reads: its state without its attention."""

from __future__ import annotations

from typing import Any

from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class NoOutput(TorchFunctionMode):
    """Leaves out the fused attention of a prefill whose output nobody reads.

    The state takes only the last queries' probabilities, which are computed apart; the fused
    attention is most of a long prefill's time, and every method would repeat it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
