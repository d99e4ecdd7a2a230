"""Rows as `arkv eval` writes them, without measuring any."""

from __future__ import annotations

from typing import Any


def fidelity(**changes: Any) -> dict[str, Any]:
    return {
        "model": "m", "text": "esther", "method": "default", "compression": 4.0, "context": 512,
        "steps": 8, "bytes": 1000, "full_bytes": 4000, "kl_mean": 0.01, "top1": 0.9,
        "ppl_ratio": 1.02, "seconds": 0.1,
    } | changes  # fmt: skip


def passkey(**changes: Any) -> dict[str, Any]:
    return {
        "model": "m", "filler": "prose", "question": 6, "keys": 1, "after": False, "context": 512,
        "method": "default", "compression": 4.0, "correct": 3, "total": 4,
    } | changes  # fmt: skip


def task(**changes: Any) -> dict[str, Any]:
    return {
        "model": "m", "dtype": "float32", "compile": "eager", "text": "a+b",
        "calibration": "by the text", "seed": 0, "prompts": 2, "task": "quote", "tokens": 512,
        "method": "default", "compression": 4.0, "scored": "tokens", "asked": "in the prompt",
        "answers": 4, "full_accuracy": 0.75, "accuracy": 0.5, "agreement": 0.25, "bytes": 1000,
        "full_bytes": 4000,
    } | changes  # fmt: skip
