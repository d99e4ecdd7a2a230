"""Decode attention over a full cache: what a compressed one has to beat."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from arkv_fx.evaluation.bench.cases import Options
from arkv_fx.evaluation.bench.timing import compiled

Attention = Callable[[Tensor, Tensor, Tensor], Any]
"""Of q [B, Hq, T, D], k and v [B, Hkv, N, D]."""


def as_transformers(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Whatever the installed transformers makes of grouped queries without a mask."""
    site: Any = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    return sdpa_attention_forward(site, q, k, v, None)[0]


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The G query heads of a kv head as G query rows: keys and values are read once, not G times.

    For T = 1 only: the rows are not causal among themselves.
    """
    heads = k.shape[1]
    rows = q.view(q.shape[0], heads, q.shape[1] // heads, q.shape[3])
    return scaled_dot_product_attention(rows, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention of a prompt: T = N."""
    return scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def _with(backend: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, enable_gqa=True)


def decode_baselines(options: Options) -> dict[str, Attention]:
    """By name; on CUDA also its fused backends and FlexAttention's decode kernel."""
    found: dict[str, Attention] = {"sdpa-transformers": as_transformers, "sdpa-packed": packed}
    if options.device.type == "cuda":
        found["sdpa-flash"] = _with(SDPBackend.FLASH_ATTENTION)
        found["sdpa-cudnn"] = _with(SDPBackend.CUDNN_ATTENTION)
        found["flex"] = compiled(_flex, options.backend, dynamic=False)
    return found


def words(nbytes: int, device: torch.device) -> Tensor:
    """About so many bytes, as int64: their sum is the least that reading them can take."""
    return torch.ones(max(1, nbytes // 8), dtype=torch.int64, device=device)
