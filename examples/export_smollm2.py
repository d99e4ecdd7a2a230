"""SmolLM2 as ONNX files and TensorRT engines: exported once, then run without torch.

ONNX Runtime runs the graphs here; the engines, built for three generations of GPUs that need not
be here, are only looked at. Exporting takes three minutes on two cores, each engine less than one.
Needs ``pip install "arkv-fx[demo,export,tensorrt]"``.
"""

import json
import tempfile
from pathlib import Path

import arkv_fx
from arkv_fx.models import load
from arkv_fx.runtime import OnnxSession

PROMPT = "The three laws of thermodynamics are:"

with tempfile.TemporaryDirectory() as out:
    model, tokenizer = load("smollm2")
    config = arkv_fx.ArkvConfig(budget=512, tiers=("int8", "int4"))
    folder = arkv_fx.export(
        model, None, Path(out) / "smollm2", "tensorrt", config=config, tokenizer=tokenizer,
        progress=print, capabilities=["SM86", "SM89", "SM120"], longest=2048,
    )  # fmt: skip
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.relative_to(folder)}")

    session = OnnxSession(folder)
    print(f"state: {session.nbytes / 2**20:.2f} MiB, whatever the length of the text")
    ids = tokenizer(PROMPT, return_tensors="np").input_ids
    print(PROMPT, end="")
    for token in session.stream(ids, 64, temperature=0.7, top_p=0.9, seed=0):
        print(tokenizer.decode(token), end="", flush=True)
    print()

    for engine in json.loads((folder / "arkv.json").read_text())["engines"]:
        print(
            f"{engine['file']}: {engine['seconds']} s, {engine['bytes'] / 2**20:.0f} MiB, "
            f"kernels {engine['kernels']}, the largest tensor between two of them holds "
            f"{engine['largest']} numbers"
        )
