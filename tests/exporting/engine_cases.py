"""Tiny exported models, each exported once per test run, and what torch does with the same."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

import arkv_fx
from arkv_fx import ArkvCache, ArkvConfig
from arkv_fx.models import random_model
from arkv_fx.plan import LayerPlan
from arkv_fx.runtime import OnnxSession
from arkv_fx.state.session import LayerState

BATCH, PROMPT, STEPS = 2, 30, 40
CAPABILITY, LONGEST = "SM89", 64
# Each architecture with other formats, so that every one is run by ONNX Runtime.
CASES = {
    "llama": ("int8", "int4"),
    "qwen3": ("native", "fp8"),
    "gemma3": ("k8v4", "int4"),
    "mistral": ("k8v4", "k4v3"),
}


def config(arch: str) -> ArkvConfig:
    """So small that the sample makes every move: into the tiers, down and out.

    Its context is one for which positions take four bytes, as in all that is exported.
    """
    return ArkvConfig(budget=24, window=4, sinks=2, tiers=CASES[arch], context=2**15)


def model(arch: str) -> PreTrainedModel:
    # With tied embeddings, gemma3 only repeats the last token, whatever its attention says.
    return random_model(arch, tie_word_embeddings=False)


@lru_cache
def folder(arch: str) -> Path:
    """An exported model, for ONNX Runtime; processes of one test run make it once."""
    return _exported(arch, arch, "onnx")


@lru_cache
def engines(arch: str) -> Path:
    """Likewise with engines for ``CAPABILITY``, for prompts up to ``LONGEST`` tokens."""
    options = {"capabilities": [CAPABILITY], "longest": LONGEST}
    return _exported(arch, f"{arch}-engines", "tensorrt", **options)


def _exported(arch: str, name: str, target: str, **options: Any) -> Path:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"process-{os.getpid()}")
    out = Path(tempfile.gettempdir()) / f"arkv-cases-{run}" / name
    out.parent.mkdir(exist_ok=True)
    with FileLock(out.with_suffix(".lock")):
        if not out.exists():
            arkv_fx.export(
                model(arch), None, out, target, config=config(arch), batch=BATCH, **options
            )
    return out


@lru_cache
def session(arch: str) -> OnnxSession:
    """It, opened."""
    return OnnxSession(folder(arch), threads=1)


@lru_cache
def transformed(arch: str) -> PreTrainedModel:
    """What must answer the same."""
    return arkv_fx.transform(model(arch), config(arch), compile="reference")  # type: ignore[return-value]


def prompt() -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, PROMPT], one of them padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 120, (BATCH, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids * mask, mask


def exported_state(opened: OnnxSession, cache: ArkvCache) -> dict[str, NDArray[Any]]:
    """A cache's state as the graphs take it."""
    return layers_state(opened, [cache.session.layers[i] for i in sorted(cache.session.layers)])


def layers_state(opened: OnnxSession, layers: Sequence[LayerState]) -> dict[str, NDArray[Any]]:
    """The state of all layers as the graphs take it."""
    found: dict[str, NDArray[Any]] = {}
    for group in opened.sidecar.content["groups"]:
        for index, info in enumerate(group["tensors"]):
            tensors = [layers[i].tensors[index] for i in group["layers"]]
            parts = [x.view(torch.int8) if info["bytes_of"] else x for x in tensors]
            found[info["input"]] = np.stack(parts).reshape(info["shape"])
    return found


def signed(state: dict[str, NDArray[Any]], opened: OnnxSession) -> dict[str, NDArray[Any]]:
    """Unsigned bytes less 128, where the graph has int8."""
    kinds = {t.input: t.dtype for t in opened.sidecar.tensors}
    return {
        name: (x.astype(np.int16) - 128).astype(np.int8)
        if kinds[name] == "int8" and x.dtype == np.uint8
        else x
        for name, x in state.items()
    }


def layer_plans(arch: str) -> list[LayerPlan]:
    """The plans of the transformed model's layers."""
    cache = ArkvCache(transformed(arch))
    ids, mask = prompt()
    with torch.no_grad():
        transformed(arch)(input_ids=ids, attention_mask=mask, past_key_values=cache)
    return [cache.session.layers[i].plan for i in sorted(cache.session.layers)]
