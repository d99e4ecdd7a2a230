"""Target "torch": saved programs, loaded again, go on as the transformed model does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import engine_cases as cases
import pytest
import torch

import arkv_fx
from arkv_fx.errors import EngineError
from arkv_fx.runtime import load_program

TIERS = ("int8", "fp8")


def test_saved_programs_answer_as_the_transformed_model(tmp_path: Path) -> None:
    config = arkv_fx.ArkvConfig(budget=24, window=4, sinks=2, tiers=TIERS)
    model = cases.random_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    folder = arkv_fx.export(model, None, tmp_path / "p", "torch", config=config, batch=2)
    sidecar = json.loads((folder / "arkv.json").read_text())
    prefill, decode = (load_program(folder, name).module() for name in ("prefill", "decode"))
    ids, mask = cases.prompt()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    tokens = []
    with torch.no_grad():
        logits, *state = prefill(*(given[n] for n in sidecar["graphs"]["prefill"]["inputs"]))
        for step in range(30):
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            logits, *state = decode(tokens[-1], mask.sum(1, keepdim=True) + step, *state)
    arkv_fx.transform(model, config, compile="reference")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert torch.cat(tokens, 1).tolist() == expected[:, ids.shape[1] :].tolist()
    assert len(expected.unique()) > 5
    loads_in_a_fresh_process(folder)
    for name, graph, says in (
        (tmp_path / "none", "decode", "no arkv.json"),
        (folder, "encode", "graph='encode': there are 'prefill', 'decode'"),
    ):
        with pytest.raises(EngineError, match=says):
            load_program(name, graph)
    (folder / "decode.pt2").write_bytes(b"no program")
    with pytest.raises(EngineError, match=r"decode\.pt2: torch cannot load it"):
        load_program(folder)


def loads_in_a_fresh_process(folder: Path) -> None:
    """By one line, and without transformers."""
    load = f"arkv_fx.runtime.load_program({str(folder)!r}, 'decode').module()"
    script = f"import sys, arkv_fx.runtime; {load}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr
