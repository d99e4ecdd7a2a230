"""Target "torch": saved programs, loaded again, go on as the transformed model does."""

from __future__ import annotations

import json
from pathlib import Path

import engine_cases as cases
import torch

import arkv_fx

TIERS = ("int8", "fp8")


def test_saved_programs_answer_as_the_transformed_model(tmp_path: Path) -> None:
    config = arkv_fx.ArkvConfig(budget=24, window=4, sinks=2, tiers=TIERS)
    model = cases.random_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    folder = arkv_fx.export(model, None, tmp_path / "p", "torch", config=config, batch=2)
    sidecar = json.loads((folder / "arkv.json").read_text())
    prefill, decode = (
        torch.export.load(folder / sidecar["graphs"][name]["file"]).module()
        for name in ("prefill", "decode")
    )
    ids, mask = cases.prompt()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    tokens = []
    with torch.no_grad():
        logits, *state = prefill(*(given[n] for n in sidecar["graphs"]["prefill"]["inputs"]))
        for step in range(30):
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            logits, *state = decode(tokens[-1], mask.sum(1, keepdim=True) + step, *state)
    arkv_fx.transform(model, config, compile="eager")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert torch.cat(tokens, 1).tolist() == expected[:, ids.shape[1] :].tolist()
    assert len(expected.unique()) > 5
