"""The skeletons of CONTRIBUTING.md, run from a file of one's own as a stranger would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.cache_utils import CacheLayerMixin

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = {
    name: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for name, section in re.findall(r"^## Add an? ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
}

START = """
import torch
import arkv_fx
from arkv_fx.models import random_model

torch.manual_seed(0)
model, prompt = random_model("llama"), torch.randint(1, 128, (1, 60))
options = {"max_new_tokens": 8, "do_sample": False}
"""

CHECKS = {
    "format": """
config = arkv_fx.ArkvConfig(budget=40, window=8, tiers=("native", "six_bits"))
arkv_fx.transform(model, config, compile="eager").generate(prompt, **options)
assert all("six_bits" in row["tiers"] for row in model.arkv.report().rows)
x = torch.randn(100, 32)
assert (SixBits().roundtrip(x) - x).abs().max() <= x.abs().max() / 31 / 2 + 1e-6
""",
    "score": """
config = arkv_fx.ArkvConfig(budget=40, window=8, score="peak")
out = arkv_fx.transform(model, config, compile="eager").generate(
    prompt, return_dict_in_generate=True, **options
)
state = out.past_key_values.tensors()
assert 0 < state["0.peak"].max() <= 2, "of one head's two queries"
""",
    "pass": """
from arkv_fx.passes import pipeline

model = random_model("gpt2")
expected = model.generate(prompt, **options)
graphs = []
inner = run
PASS = Pass("no_dropout", lambda graph, context: graphs.append(inner(graph, context)) or graphs[-1])
pipeline.PASSES = pipeline.in_order(PASS, *pipeline.PASSES)
arkv_fx.transform(model, arkv_fx.ArkvConfig(budget=128, tiers=("native",)), compile="eager")
assert torch.equal(model.generate(prompt, **options), expected)
assert max(graphs) > 1, graphs
""",
    "kernel": """
from arkv_fx.kernels import usable
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend as run
from arkv_fx.plan import plan_layer
from arkv_fx.state.session import LayerState

assert usable(torch.device("cpu"))[0] == "yours"
plan = plan_layer(
    arkv_fx.ArkvConfig(budget=24, window=4, sinks=2), heads=2, k_dim=16, v_dim=16,
    dtype=torch.float32,
)
results = []
for kernel in ("yours", "reference"):
    torch.manual_seed(0)
    state = LayerState(plan, 1, torch.device("cpu")).tensors
    for length in (30, 1, 1, 1):
        q, k, v = (torch.randn(1, heads, length, 16) for heads in (4, 2, 2))
        out = run(q, k, v, None, state, plan, Knobs(0.25), length > 1, kernel)
    results.append(out)
torch.testing.assert_close(*results)
""",
    "export target": """
import json, tempfile

config = arkv_fx.ArkvConfig(budget=40, window=8)
folder = arkv_fx.export(model, None, tempfile.mkdtemp(), "text", config=config)
graphs = json.loads((folder / "arkv.json").read_text())["graphs"]
for name in ("prefill", "decode"):
    assert graphs[name]["file"] == f"{name}.txt"
    assert "ExportedProgram" in (folder / f"{name}.txt").read_text()
""",
    "cache of an architecture": """
model.config.layer_types = ["windowed_attention", "full_attention"]
config = arkv_fx.ArkvConfig(budget=40, window=8)
arkv_fx.transform(model, config, compile="eager").generate(prompt, **options)
assert model.arkv.report().fused == 2
arkv_fx.restore(model)
KNOWN_LAYERS.remove(WindowedLayer)
try:
    arkv_fx.transform(model, config, compile="eager")
except arkv_fx.errors.TransformError as error:
    assert "WindowedLayer, which arkv_fx does not know" in str(error)
else:
    raise AssertionError("an unknown layer was taken")
""",
}


def test_every_skeleton_has_a_check() -> None:
    assert {name: len(blocks) for name, blocks in BLOCKS.items()} == dict.fromkeys(CHECKS, 1)


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "mine.py"
    file.write_text(text)
    return subprocess.run(
        [sys.executable, "-P", str(file)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_skeleton(name: str, tmp_path: Path) -> None:
    if name == "cache of an architecture" and not hasattr(CacheLayerMixin, "_layer_type"):
        pytest.skip("this transformers has no layers of an architecture's own")
    (block,) = BLOCKS[name]
    found = run(block + START + CHECKS[name], tmp_path)
    assert found.returncode == 0, found.stderr


def test_a_skeleton_that_does_nothing_fails(tmp_path: Path) -> None:
    """Negative control: without its last line a format is unknown."""
    block = BLOCKS["format"][0].rpartition("FORMATS.add")[0]
    found = run(block + START + CHECKS["format"], tmp_path)
    assert found.returncode == 1 and "unknown format 'six_bits'" in found.stderr


def test_the_checks_are_those_of_ci() -> None:
    """What CONTRIBUTING, pre-commit and CI run before the tests."""
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^  ((?:ruff|mypy) .+)$", script, re.M) == hooks
    assert " && ".join(hooks) in TEXT
