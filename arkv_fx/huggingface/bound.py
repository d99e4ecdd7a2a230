"""What is bound to one model in one process, as ``model.arkv`` is: neither copied nor pickled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch.utils.hooks import RemovableHandle

from arkv_fx.errors import TransformError
from arkv_fx.weights.quantizing import Quantized


class Bound:
    """What cannot leave the model that it was made for."""

    watching: Sequence[RemovableHandle] = ()  # hooks, which ``restore`` removes
    quantized: Quantized | None = None  # what ``transform`` did to the weights

    def weight_notes(self) -> list[str]:
        """What the report says of the weights."""
        return [] if self.quantized is None else [self.quantized.note()]

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TransformError(
            "a transformed model cannot be copied: its compiled forward is bound to this model; "
            "call arkv_fx.restore(model), copy, and transform both"
        )

    def __reduce__(self) -> NoReturn:
        raise TransformError(
            "a transformed model is neither pickled nor saved whole: its compiled graphs belong to "
            "this process; save model.state_dict() or call model.save_pretrained(folder), or "
            "arkv_fx.restore(model) first, and transform again after loading"
        )
