"""Many steps and many calls in one process; prints its resident memory in KiB as it goes.

``python flat_memory.py LOWERING STEPS CALLS``: a tiny model decodes STEPS tokens with one cache,
then answers CALLS prompts of changing lengths by ``generate()``. A line "steps N KIB" or
"calls N KIB" after each tenth of them, the first tenth being the time to warm up.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch

from arkv_fx import ArkvCache, ArkvConfig, transform
from arkv_fx.models import random_model

kept: list[Any] = []  # what the negative control never lets go


def resident() -> int:
    """Resident memory of this process in KiB."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@torch.no_grad()
def steps(model: Any, count: int, leak: bool) -> None:
    """Decode ``count`` tokens with one cache."""
    cache = ArkvCache(model)
    token = model(torch.ones(1, 40, dtype=torch.long), past_key_values=cache).logits[:, -1:]
    for number in range(1, count + 1):
        token = model(token.argmax(-1)[:, -1:], past_key_values=cache).logits
        if leak:
            kept.append(torch.ones(1024))
        if number % (count // 10) == 0:
            print("steps", number, resident(), flush=True)
    assert cache.get_seq_length() == 40 + count


def calls(model: Any, count: int) -> None:
    """Answer ``count`` prompts."""
    for number in range(1, count + 1):
        prompt = torch.full((1, 10 + number * 7 % 50), number % 100 + 1)
        model.generate(prompt, max_new_tokens=8, do_sample=False)
        if number % (count // 10) == 0:
            print("calls", number, resident(), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    lowering, many, answers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    tiny = random_model("llama", num_hidden_layers=1)
    config = ArkvConfig(budget=64, window=8)
    transform(tiny, config, compile=lowering)
    steps(tiny, many, leak=len(sys.argv) > 4)
    calls(tiny, answers)
