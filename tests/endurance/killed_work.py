"""Work that may be killed: ``python killed_work.py TASK FOLDER``, which writes in FOLDER only.

Prints "begin" once all is imported, and at the end a line "end ANSWER", which is always the same.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import arkv_fx
from arkv_fx import models
from arkv_fx.models import random_model

CONFIG = arkv_fx.ArkvConfig(budget=32, window=8, sinks=2)
PROMPT = torch.arange(1, 61)[None]


def conversion(folder: Path) -> str:
    """A packaged GGUF file as safetensors; ARKV_CACHE lies in the folder."""
    model, _ = models.load("smollm2")
    return repr(float(model.get_input_embeddings().weight.double().sum()))  # type: ignore[operator]


def calibration(folder: Path) -> str:
    """A calibration, measured and written."""
    path, model = folder / "calibration.json", random_model("llama")
    arkv_fx.calibrate(model, PROMPT, CONFIG.replace(compression=2.0, context=128)).save(path)
    arkv_fx.Calibration.load(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compilation(folder: Path) -> str:
    """Inductor's graphs and the C++ library; Inductor's cache lies in the folder."""
    model: Any = arkv_fx.transform(random_model("llama", num_hidden_layers=1), CONFIG)
    return str(model.generate(PROMPT, max_new_tokens=8, do_sample=False)[0, -8:].tolist())


def export(folder: Path) -> str:
    """Exported graphs."""
    model = random_model("llama", num_hidden_layers=1)
    out = arkv_fx.export(model, None, folder / "exported", "torch", config=CONFIG)
    return ", ".join(sorted(path.name for path in out.iterdir()))


TASKS: dict[str, Callable[[Path], str]] = {
    task.__name__: task for task in (conversion, calibration, compilation, export)
}
RESULTS = ("cache/smollm2-*", "calibration.json", "exported")  # what would leave nothing to do


def main(task: str, folder: Path) -> None:
    """Do it once more."""
    torch.set_num_threads(1)
    for result in (path for pattern in RESULTS for path in folder.glob(pattern)):
        if result.is_dir():
            shutil.rmtree(result)
        elif result.suffix != ".lock":
            result.unlink()
    print("begin", flush=True)
    print("end", TASKS[task](folder), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
