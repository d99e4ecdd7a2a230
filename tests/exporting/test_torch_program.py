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
from arkv_fx.models import random_model
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
    arkv_fx.transform(model, config, compile="reference")
    found = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False,
                           output_logits=True, return_dict_in_generate=True)  # fmt: skip
    arkv_fx.restore(model)
    expected = found.sequences[:, ids.shape[1] :]
    with torch.no_grad():
        logits, *state = prefill(*(given[n] for n in sidecar["graphs"]["prefill"]["inputs"]))
        for step, other in enumerate(found.logits):
            # Numbers that lie between two codes may be stored as either.
            torch.testing.assert_close(logits[:, -1], other, atol=0.05, rtol=0.0)
            token, top = expected[:, step : step + 1], other.topk(2).values
            sure = (top[:, 0] - top[:, 1] > 0.1)[:, None]
            assert ((logits[:, -1].argmax(-1, keepdim=True) == token) | ~sure).all()
            logits, *state = decode(token, mask.sum(1, keepdim=True) + step, *state)
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


def test_experts_go_where_transformers_is_not(tmp_path: Path) -> None:
    model = random_model("qwen3_moe", num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    config = arkv_fx.ArkvConfig(budget=64, window=8, tiers=("native",))
    folder = arkv_fx.export(model, None, tmp_path / "moe", "torch", config=config)
    ids = torch.randint(1, 120, (1, 30), generator=torch.Generator().manual_seed(0))
    script = f"""
import sys, torch
from arkv_fx.runtime import load_program
ids, places = torch.tensor({ids.tolist()}), torch.arange(30)[None]
prefill, decode = (load_program({str(folder)!r}, name).module() for name in ("prefill", "decode"))
first, *state = prefill(ids[:, :29], torch.ones_like(places[:, :29]), places[:, :29])
second, *state = decode(ids[:, 29:], places[:, 29:], *state)
assert "transformers" not in sys.modules
torch.save(torch.cat([first, second], 1), {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(ids).logits[:, -2:]
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-4)


class Foreign(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.elsewhere.doubled(x)
        return out


def test_operators_that_nobody_has_registered_are_named(tmp_path: Path) -> None:
    """A saved program says which; torch says it in a warning only."""
    library = torch.library.Library("elsewhere", "DEF")
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake("elsewhere::doubled", torch.empty_like, lib=library)
    program = torch.export.export(Foreign(), (torch.ones(3),))
    torch.export.save(program, tmp_path / "decode.pt2")
    sidecar = {"target": "torch", "graphs": {"decode": {"file": "decode.pt2"}}}
    (tmp_path / "arkv.json").write_text(json.dumps(sidecar))
    assert load_program(tmp_path).module()(torch.ones(3)).tolist() == [2, 2, 2]
    script = f"from arkv_fx.runtime import load_program; load_program({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "it calls elsewhere::doubled: import what registers that first" in done.stderr
