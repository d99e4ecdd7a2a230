"""Exported graphs in the hands of others: plain ONNX Runtime, Node.js, quantizers, optimizers."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import quantize_dynamic
from onnxscript import optimizer

import arkv_fx
from arkv_fx.errors import EngineError
from arkv_fx.models import random_model
from arkv_fx.runtime import OnnxSession, sign

EXAMPLE = Path(__file__).parents[2] / "examples" / "decode.mjs"
GRAPHS = ("prefill", "decode")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer with the default tiers, so small that a long prompt fills them and loses tokens."""
    config = arkv_fx.ArkvConfig(budget=40, window=8)
    model = random_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    return arkv_fx.export(model, None, tmp_path_factory.mktemp("engine") / "e", config=config)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(exported, tmp_path / "engine"))


def prompt(length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(length).integers(1, 120, (1, length))


class Plain:
    """A decode loop that knows ``arkv.json``, onnxruntime and numpy."""

    def __init__(self, folder: Path) -> None:
        self.said = json.loads((folder / "arkv.json").read_text())["graphs"]
        self.sessions = {
            n: onnxruntime.InferenceSession(folder / self.said[n]["file"]) for n in GRAPHS
        }

    def run(self, name: str, **feeds: Any) -> dict[str, np.ndarray[Any, Any]]:
        found = self.sessions[name].run(None, feeds)
        return dict(zip(self.said[name]["outputs"], found, strict=True))

    def steps(self, ids: np.ndarray[Any, Any], count: int) -> list[dict[str, Any]]:
        """What each graph gave in turn, tokens chosen greedily."""
        length, mask = ids.shape[1], np.ones_like(ids)
        places = np.arange(length)[None]
        out = [self.run("prefill", input_ids=ids, attention_mask=mask, position_ids=places)]
        for place in range(length, length + count):
            token = out[-1]["logits"][:, -1].argmax(-1)[:, None]
            state = {n.replace("present", "past_key_values"): x for n, x in out[-1].items()}
            del state["logits"]
            at = np.array([[place]])
            out.append(self.run("decode", input_ids=token, position_ids=at, **state))
        return out


@pytest.mark.parametrize("length", [1, 2, 8, 9, 60])
def test_a_plain_loop_takes_prompts_of_any_length(exported: Path, length: int) -> None:
    ids, session = prompt(length), OnnxSession(exported, threads=1)
    steps = Plain(exported).steps(ids, 12)
    tokens = [int(out["logits"].argmax()) for out in steps]
    assert tokens == session.generate(ids, 13)[0].tolist()
    if length < 60:  # token by token from an empty state: nothing depends on the padding
        session.reset()
        for token in ids.T:
            stepped = session.step(token)
        assert np.abs(steps[0]["logits"][:, -1] - stepped).max() < 1e-4
    assert {x.dtype.name for out in steps for x in out.values()} <= {
        "float32", "float16", "int32", "int8",
    }  # fmt: skip


@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs Node.js")
def test_node_decodes_the_same_tokens(exported: Path, tmp_path: Path) -> None:
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "onnxruntime-node"]
    done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"onnxruntime-node cannot be installed: {done.stderr[-200:]}")
    shutil.copy(EXAMPLE, tmp_path)
    session = OnnxSession(exported, threads=1)
    for length in (2, 60):
        ids = [str(token) for token in prompt(length)[0]]
        run = subprocess.run(
            ["node", EXAMPLE.name, str(exported), "16", *ids],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        expected = session.generate(prompt(length), 16)[0].tolist()
        assert len(set(expected)) > 5
        assert json.loads(run.stdout) == expected


def quantize(folder: Path, rotations: bool) -> None:
    for name in GRAPHS:
        file = folder / f"{name}.onnx"
        nodes = [n.name for n in onnx.load(file, load_external_data=False).graph.node]
        left_out = [n for n in nodes if "hadamard" in n and not rotations]
        quantize_dynamic(file, file, nodes_to_exclude=left_out)


def test_quantized_graphs_open_under_a_warning_until_they_are_signed(
    folder: Path, exported: Path
) -> None:
    quantize(folder, rotations=False)
    kinds = {n.op_type for n in onnx.load(folder / "decode.onnx").graph.node}
    assert "MatMulInteger" in kinds
    with pytest.warns(UserWarning, match=r"prefill.onnx, decode.onnx changed.*sign\("):
        OnnxSession(folder, threads=1)
    sign(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session = OnnxSession(folder, threads=1)
    exact = OnnxSession(exported, threads=1).prefill(prompt(60))
    found = session.prefill(prompt(60))
    assert 0 < np.abs(found - exact).max() < 0.2 * np.abs(exact).max()
    session.step([5])
    (folder / "decode.onnx").write_bytes((exported / "decode.onnx").read_bytes())
    with pytest.warns(
        UserWarning, match=r"decode.onnx.*changed since the export"
    ):  # a signature is of these files
        OnnxSession(folder, threads=1)


def test_rotations_left_out_keep_the_cache_exact(folder: Path, exported: Path) -> None:
    """What is kept for a token decides on later ones: the codes' error is not the quantizer's."""
    rotated = {}
    for rotations in (False, True):
        copy = Path(shutil.copytree(exported, folder.parent / str(rotations)))
        quantize(copy, rotations)
        held = onnx.load(copy / "prefill.onnx").graph.initializer
        rotated[rotations] = [t.name for t in held if "hadamard" in t.name and t.data_type == 1]
    assert [n for n in rotated[False] if "scale" not in n]
    assert not [n for n in rotated[True] if "scale" not in n], "negative control"


def test_graphs_with_weights_of_their_own_open(folder: Path) -> None:
    """As a quantizer of four bits writes them: beside the graph."""
    for name in GRAPHS:
        model = onnx.load(folder / f"{name}.onnx")
        onnx.save(
            model, folder / f"{name}.onnx", save_as_external_data=True,
            location=f"{name}.onnx.data", size_threshold=100,
        )  # fmt: skip
    (folder / "weights.data").unlink()
    with pytest.warns(UserWarning, match=r"decode.onnx, decode.onnx.data changed"):
        OnnxSession(folder, threads=1)
    sign(folder)
    OnnxSession(folder, threads=1).generate(prompt(5), 3)
    weights = folder / "decode.onnx.data"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    with pytest.raises(EngineError, match="not the weights"):
        OnnxSession(folder)


def test_what_is_of_another_export_is_not_signed(folder: Path) -> None:
    text = (folder / "arkv.json").read_text()
    (folder / "arkv.json").write_text(text.replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(EngineError, match="of another export: they differ in model"):
        sign(folder)
    (folder / "decode.onnx").unlink()
    with pytest.raises(EngineError, match=r"decode\.onnx"):
        sign(folder)


def test_optimized_graphs_give_the_same_logits_and_keep_the_same_tokens(
    exported: Path, folder: Path
) -> None:
    for name in GRAPHS:
        onnx.save(optimizer.optimize(onnx.load(folder / f"{name}.onnx")), folder / f"{name}.onnx")
    expected, found = (Plain(f).steps(prompt(100), 30) for f in (exported, folder))
    kept = [out["present.0.pos"] for out in expected]
    assert len({tuple(sorted(x.ravel())) for x in kept}) > 20, "nothing moved"
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a["logits"] - b["logits"]).max() < 1e-4
        assert (a["present.0.pos"] == b["present.0.pos"]).all()
        assert np.isfinite(a["logits"]).all()
