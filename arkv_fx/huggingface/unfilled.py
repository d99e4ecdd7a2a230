"""The cache of a call that was differentiated: filled when somebody reads it.

With gradients on a model answers as it was, since a compressed cache is not differentiated. Most
who differentiate never look at the cache; who only forgot ``torch.no_grad()`` goes on with it.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.utils.generic import ModelOutput

from arkv_fx.huggingface.cache import ArkvCache

_filling = threading.RLock()


class UnfilledCache(ArkvCache):
    """An ``ArkvCache`` that runs its tokens through the model when it is first read."""

    def __init__(self, fill: Callable[[], ArkvCache]) -> None:
        self.__dict__["fill"] = fill

    def __getattr__(self, name: str) -> Any:  # there is nothing before it is filled
        if name.startswith("__"):
            raise AttributeError(name)
        with _filling:  # by one thread; others wait for it
            if type(self) is UnfilledCache:
                self.__dict__ = self.__dict__["fill"]().__dict__
                self.__class__ = ArkvCache  # type: ignore[assignment]
                self.claim_layers()
        return getattr(self, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> ArkvCache:
        self.session  # noqa: B018  (fills it)
        return copy.deepcopy(self, memo)


def with_unfilled(out: Any, names: Sequence[str], whole: Any, run: Callable[[Any], Any]) -> Any:
    """The output of a call without a cache, with one that is yet to be filled.

    Args:
        out: a ``ModelOutput``; one that has no place for a cache comes back as it is.
        names: what a cache may be called there.
        whole: an empty cache, or a pair that holds one.
        run: fills such a cache or pair.
    """
    kind: Any = type(out)
    known = [f.name for f in dataclasses.fields(kind)] if isinstance(out, ModelOutput) else []
    place = next((name for name in names if name in known), None)
    if place is None:
        return out
    later: Any = copy.copy(whole) if isinstance(whole, EncoderDecoderCache) else None
    empty: ArkvCache = whole if later is None else whole.self_attention_cache

    def fill() -> ArkvCache:
        run(whole)
        return empty

    unfilled = UnfilledCache(fill)
    if later is not None:  # what it holds of the encoder is shared
        later.self_attention_cache = unfilled
    return dataclasses.replace(out, **{place: unfilled if later is None else later})


def as_now(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that stay as they are when the caller goes on writing to its tensors."""
    return {n: x.detach().clone() if isinstance(x, Tensor) else x for n, x in kwargs.items()}
