"""transformers' attention interface, led to what the passes can read.

Flex and flash attention are closed to the passes. While one of our caches is in use, a model that
asks for them gets the implementation ``"arkv"`` instead: ``arkv::attention`` where logits are
soft-capped or have sinks, which SDPA cannot express, and SDPA elsewhere. Eager attention stays: a
model may do there what it tells no interface, and ``find_softmax`` reads what it really does.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)

NAME = "arkv"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; query [B, Hq, T, D], key and value [B, Hkv, S, D]."""
    if softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return out, None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = query.shape[2] > 1 and attention_mask is None and causal
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = torch.ops.arkv.attention(
        query, key, value, attention_mask, causal, scale, softcap or 0.0, s_aux
    )
    return out.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of transformers: ``sdpa_mask``, and none where causality says it all.

    ``sdpa_mask`` leaves it out, too, but not in a graph that is being traced by torch before 2.13
    (where ``torch.compiler.is_exporting()`` is true in every graph) or by transformers 5.17. Then
    each decoded token would have a mask, which grows with the text.
    """
    local = local_size is not None and kv_length >= local_size
    if attention_mask is None and allow_is_causal_skip and not local:
        if q_length == 1 or q_length == kv_length:
            return None
    made: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs,
    )  # fmt: skip
    return made


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)

# From these releases on ``sdpa_mask`` leaves out in a traced graph, too, what says nothing.
_decides = getattr(masking_utils, "_ignore_causal_mask_sdpa", None)
LEAVES_OUT = Version(torch.__version__).release >= (2, 13) and (
    "is_torchdynamo_exporting" in getattr(getattr(_decides, "__code__", None), "co_names", ())
)
_thread = threading.local()


def _in_step() -> bool:
    return getattr(_thread, "steps", 0) > 0


# Asked once while a graph is traced, which is one of ours or is not.
torch._dynamo.assume_constant_result(_in_step)


def mask_by_caller(*args: Any, **kwargs: Any) -> Tensor | None:
    """``mask`` in a step of ours, ``sdpa_mask`` for everybody else, other threads included."""
    return mask(*args, **kwargs) if _in_step() else sdpa_mask(*args, **kwargs)


@contextmanager
def masks_left_out() -> Generator[None]:
    """Within it, in this thread, models of SDPA attention leave masks out that say nothing.

    With releases that do not by themselves ``mask_by_caller`` takes the place of ``sdpa_mask`` for
    good: to swap them in every step would change what other threads trace meanwhile.
    """
    if LEAVES_OUT:
        yield
        return
    if ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask:  # else another library's, or ours
        AttentionMaskInterface.register("sdpa", mask_by_caller)
    _thread.steps = getattr(_thread, "steps", 0) + 1
    try:
        yield
    finally:
        _thread.steps -= 1


class OpenAttention:
    """Lets the model of a configuration that asks for flex or flash attention ask for ours.

    While at least one step of it runs, in whatever thread.
    """

    def __init__(self, config: Any) -> None:
        self.config, self.lock, self.steps = config, threading.Lock(), 0
        self.before = ""

    @contextmanager
    def step(self) -> Generator[None]:
        """Around each step."""
        with self.lock:
            asked = getattr(self.config, "_attn_implementation_internal", None)
            if isinstance(asked, str) and asked.startswith(("flex_", "flash_")):
                self.before, self.config._attn_implementation_internal = asked, NAME
            self.steps += 1
        try:
            yield
        finally:
            with self.lock:
                self.steps -= 1
                if not self.steps and self.before:
                    self.config._attn_implementation_internal, self.before = self.before, ""
