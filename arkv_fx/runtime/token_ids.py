"""What a caller gives as token ids is of the kind that is meant, or refused by name."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arkv_fx.errors import EngineError
from arkv_fx.runtime.manifest import Sidecar

Tokens = NDArray[np.int64]


def integers(name: str, given: ArrayLike) -> Tokens:
    """Whole numbers of any shape.

    Raises:
        EngineError: for anything else.
    """
    try:
        found = np.asarray(given)
    except ValueError:
        raise EngineError(f"{name}: give integers in rows of one length") from None
    if found.size and found.dtype.kind not in "iub":
        raise EngineError(f"{name} are {found.dtype}; give integers")
    return found.astype(np.int64)


def token_ids(ids: ArrayLike, sidecar: Sidecar) -> Tokens:
    """Token ids [B, T], T >= 1.

    Raises:
        EngineError: for anything else, another batch or another vocabulary.
    """
    tokens = integers("ids", ids)
    if tokens.ndim != 2 or tokens.shape[0] != sidecar.batch or tokens.shape[1] < 1:
        raise EngineError(
            f"ids {tokens.shape}: these graphs take [{sidecar.batch}, tokens]; export with "
            "another batch for more sequences"
        )
    if tokens.min() < 0 or tokens.max() >= sidecar.vocabulary:
        raise EngineError(f"ids must be in 0..{sidecar.vocabulary - 1}")
    return tokens
