"""Our operators compute in the dtypes of what they are given, whatever ``torch.autocast`` says.

It has had its say on what they are given (``passes.autocast``); codes and statistics have dtypes of
their own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available


def as_given(x: Tensor) -> AbstractContextManager[object]:
    """Within it operators on the device of ``x`` cast nothing by themselves."""
    kind = x.device.type
    on = is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()
