"""The Triton kernel where there is no GPU: in its interpreter, and what it says without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arkv_fx.errors import KernelError
from arkv_fx.kernels import get_kernel
from arkv_fx.kernels.gpu.launch import chunk_slots
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.state.session import LayerState

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@needs_triton
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton chooses between interpreter and compiler when imported."""
    file = Path(__file__).with_name("interpreted_triton.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _call() -> None:
    plan = LayerPlan(1, 8, 8, torch.float32, 4, 0, 0, (Tier("int8", 8),), "combined")
    held = LayerState(plan, 1, torch.device("cpu")).view()
    q, k, v = torch.randn(3, 1, 1, 1, 8)
    get_kernel("triton")(q[:, :, None], k, v, None, held, Knobs(1.0), held.seen[:, None])


@needs_triton
def test_tensors_on_the_cpu_are_refused() -> None:
    with pytest.raises(KernelError, match="on CUDA devices and the tensors are on 'cpu'"):
        _call()


def test_without_triton_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="Triton is not installed"):
        _call()


@pytest.mark.parametrize(
    ("slots", "rows", "splits"),
    [
        (2048, 8, 64),  # one sequence: as many programs as there are blocks
        (32768, 8, 64),  # 512 programs for 132 processors
        (2048, 512, 1),  # a large batch fills the GPU by itself
        (1, 1, 1),
        (1 << 20, 1, 128),  # never so many that combining them takes longer
    ],
)
def test_chunks_fill_the_processors(slots: int, rows: int, splits: int) -> None:
    chunk = chunk_slots(slots, rows, processors=132, block=32)
    assert chunk % 32 == 0 and -(-slots // chunk) == splits
