#!/usr/bin/env bash
# Torch-TensorRT 2.14.0 for RTX (torch 2.14.1, tensorrt-rtx 1.6.1): x[:, -8:] of a matrix of free size.
#
# Guess: a slice that counts from the end of one dimension leaves the others alone, whether their
# lengths are free or not; the partitioner says that it is supported.
# Behaviour: the conversion takes the start -8 for one from which the input's shape is subtracted, with
# -1 for every other free length: those begin one behind their end. With one free length it builds a
# plan, with two it ends in "inherently negative length". Slices that begin at a computed place build.
#
# Seen (no GPU: the questions for a device are answered, what would load the plan says that it is there):
#   one length free: a plan
#   both free: RuntimeError: Could not get tensor shape.
#   both free, from x.shape[1] - 8: a plan
# It fails if that changes. It installs about 6 GB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
rtx=1.6.1.120
"$work/venv/bin/pip" install -q torch==2.14.1 numpy dllist psutil packaging typing-extensions 2>/dev/null
"$work/venv/bin/pip" install -q --no-deps torch-tensorrt-rtx==2.14.0 "tensorrt-rtx==$rtx" \
  "tensorrt-rtx-cu13==$rtx" "tensorrt-rtx-cu13-bindings==$rtx" "tensorrt-rtx-cu13-libs==$rtx" 2>/dev/null
cat >"$work/look.py" <<'PY'
from types import SimpleNamespace

import torch


class Cut(torch.nn.Module):
    def __init__(self, computed=False):
        super().__init__()
        self.computed = computed

    def forward(self, x):
        start = x.shape[1] - 8 if self.computed else -8
        return x[:, start:] * 2.0


def exported(module, *free):
    length = torch.export.Dim("length", min=9, max=128)
    shapes = (dict.fromkeys(free, length),)
    return torch.export.export(module, (torch.zeros(1, 20, 20),), dynamic_shapes=shapes, strict=False)


programs = exported(Cut(), 1), exported(Cut(), 1, 2), exported(Cut(True), 1, 2)
answers = {
    "get_device_capability": (8, 9), "current_device": 0, "device_count": 1, "get_device_name": "none",
    "get_device_properties": SimpleNamespace(
        major=8, minor=9, name="none", total_memory=24 << 30, multi_processor_count=100
    ),
    "mem_get_info": (20 << 30, 24 << 30), "synchronize": None, "set_device": None, "empty_cache": None,
}
for name, answer in answers.items():
    setattr(torch.cuda, name, lambda *_, answer=answer: answer)
import torch_tensorrt
from torch_tensorrt.dynamo.conversion import _TRTInterpreter


class Built(Exception):
    pass


class Runtime:
    def __init__(self, log): ...

    def deserialize_cuda_engine(self, plan):
        raise Built


_TRTInterpreter.trt.Runtime = Runtime


def said(program, last):
    sizes = [(1, n, last or n) for n in (9, 64, 128)]
    given = torch_tensorrt.Input(
        min_shape=sizes[0], opt_shape=sizes[1], max_shape=sizes[2], dtype=torch.float32
    )
    try:
        torch_tensorrt.dynamo.compile(
            program, arg_inputs=[given], min_block_size=1, require_full_compilation=True
        )
    except Built:
        return "a plan"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


found = said(programs[0], 20), said(programs[1], 0), said(programs[2], 0)
for case, answer in zip(("one length free", "both free", "both free, from x.shape[1] - 8"), found):
    print(f"{case}: {answer}")
expected = "a plan", "RuntimeError: Could not get tensor shape.", "a plan"
assert found == expected, "it slices otherwise now"
PY
"$work/venv/bin/python" "$work/look.py" 2>/dev/null
