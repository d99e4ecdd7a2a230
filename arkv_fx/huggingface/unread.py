"""A warning to who measures a small cache by forwards that never read it."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

from torch import Tensor

HARNESS = "lm_eval.models.huggingface"


def _called_by(module: str) -> bool:
    frame: FrameType | None = None if module not in sys.modules else sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


def warn_if_scored(input_ids: Any, window: int) -> None:
    """Where lm-eval's own model calls, without a cache, and there is much to compress.

    Args:
        input_ids: of the call, [B, T] int64; so few tokens as the window holds say nothing.
    """
    if isinstance(input_ids, Tensor) and input_ids.shape[-1] > window and _called_by(HARNESS):
        warnings.warn(
            "a transformed model answers a text in one forward: it is read uncompressed, and the "
            "cache that it fills is never read. So log-likelihoods that lm-eval's model hf takes "
            "are those of the full cache under any budget (what it generates is compressed): "
            "use arkv_fx.evaluation.lm_eval_model.ArkvLM, which scores through the cache",
            UserWarning,
            stacklevel=2,
        )
