"""Damaged, mismatched and malicious folders give named errors; nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_cases as cases
import onnx
import pytest

from arkv_fx.errors import EngineError
from arkv_fx.runtime import OnnxSession, read_sidecar
from arkv_fx.runtime.digests import said_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(cases.folder("llama"), tmp_path / "engine"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change arkv.json."""
    content = json.loads((folder / "arkv.json").read_text())
    change(content)
    (folder / "arkv.json").write_text(json.dumps(content))


def edit_graph(folder: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    """Change decode.onnx."""
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    change(model)
    (folder / "decode.onnx").write_bytes(model.SerializeToString())


def locate(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = name

    return change


def locate_in_node(name: str) -> Callable[[onnx.ModelProto], None]:
    """A constant in a node's attribute reads files, too."""

    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "Constant")
        attribute = node.attribute[0]
        attribute.Clear()
        attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
        tensor = attribute.t
        tensor.data_type, tensor.data_location = 1, onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", name

    return change


def opens(folder: Path) -> None:
    OnnxSession(folder, threads=1)


def refuses(folder: Path, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        opens(folder)


def test_an_untouched_copy_opens(folder: Path) -> None:
    opens(folder)
    edit(folder, lambda content: None)
    edit_graph(folder, lambda model: None)
    opens(folder)  # so what the other tests see is what they changed


@pytest.mark.parametrize("name", ["arkv.json", "weights.data", "prefill.onnx", "decode.onnx"])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refuses(folder, name)


def test_truncated_weights(folder: Path) -> None:
    path = folder / "weights.data"
    path.write_bytes(path.read_bytes()[:-100])
    refuses(folder, "weights.data: .* truncated or replaced")


@pytest.mark.parametrize("place", [0, 12345, -1])
def test_weights_of_equal_size_that_are_others(folder: Path, place: int) -> None:
    path = folder / "weights.data"
    held = bytearray(path.read_bytes())
    held[place] ^= 1
    path.write_bytes(held)
    refuses(folder, "weights.data: not the weights that were exported with these graphs")
    path.write_bytes(bytes(len(held)))
    refuses(folder, "weights.data: not the weights that were exported with these graphs")


def test_weights_are_read_through_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens(folder)
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("read again"))
    opens(folder)


@pytest.mark.parametrize("keep", [0, 100, 50_000])
def test_truncated_graphs(folder: Path, keep: int) -> None:
    path = folder / "decode.onnx"
    path.write_bytes(path.read_bytes()[:keep])
    refuses(folder, "decode.onnx")


def test_a_graph_that_is_something_else(folder: Path) -> None:
    (folder / "decode.onnx").write_bytes(b"\x80\x04\x95" + b"\xff" * 1000)
    refuses(folder, "decode.onnx: damaged, not an ONNX file")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1, "opset": 21}'])
def test_a_damaged_sidecar(folder: Path, text: str) -> None:
    (folder / "arkv.json").write_text(text)
    refuses(folder, "arkv.json")


def test_a_sidecar_of_another_model(folder: Path) -> None:
    shutil.copy(cases.folder("mistral") / "arkv.json", folder)
    weights = folder / "weights.data"
    edit(folder, lambda c: c["files"].update({weights.name: said_of(weights)}))
    refuses(folder, "arkv.json is of another export: they differ in .*model")


def test_an_unknown_version(folder: Path) -> None:
    edit(folder, lambda c: c.update(version=99))
    refuses(folder, "format version 99; this arkv_fx reads version 3")


def test_a_wrong_opset_of_the_sidecar(folder: Path) -> None:
    edit(folder, lambda c: c.update(opset=18))
    refuses(folder, "arkv.json: opset 18")


def test_a_wrong_opset_of_a_graph(folder: Path) -> None:
    edit_graph(folder, lambda m: setattr(m.opset_import[0], "version", 18))
    refuses(folder, "decode.onnx: opset 18; this arkv_fx runs opset 21")


OUTSIDE = ["../secret.data", "/etc/passwd", "..", "sub/weights.data", ""]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", [locate, locate_in_node])
def test_external_data_that_leads_out_of_the_folder(
    folder: Path, name: str, where: Callable[[str], Callable[[onnx.ModelProto], None]]
) -> None:
    edit_graph(folder, where(name))
    with pytest.raises(EngineError, match="leads out of the folder"):
        read_sidecar(folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_sidecar_files_that_lead_out_of_the_folder(folder: Path, name: str) -> None:
    edit(folder, lambda c: c["graphs"]["decode"].update(file=name))
    refuses(folder, "leads out of the folder")


def test_external_data_beyond_the_end(folder: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "offset").value = str(10**9)

    edit_graph(folder, change)
    refuses(folder, "decode.onnx: it reads .* bytes")


def test_a_graph_without_our_metadata(folder: Path) -> None:
    edit_graph(folder, lambda m: m.ClearField("metadata_props"))
    refuses(folder, "no metadata")


def test_a_graph_that_the_runtime_cannot_run(folder: Path) -> None:
    edit_graph(folder, lambda m: setattr(m.graph.node[0], "op_type", "Nonsense"))
    refuses(folder, "ONNX Runtime cannot run it")


@pytest.mark.parametrize(
    "value", ["Infinity", "NaN", "-1", "0", "1.5", '"1"', "null", "[1]", "true"]
)
@pytest.mark.parametrize("name", ["batch", "least_prompt", "vocabulary", "bytes"])
def test_numbers_of_the_sidecar_that_are_none(folder: Path, name: str, value: str) -> None:
    text = (folder / "arkv.json").read_text()
    changed = re.sub(rf'"{name}": \d+', f'"{name}": {value}', text)
    assert changed != text
    (folder / "arkv.json").write_text(changed)
    refuses(folder, "arkv.json: damaged|weights.data: .* bytes where|least_prompt|batch")


@pytest.mark.parametrize("name", ["groups", "graphs", "files", "model"])
@pytest.mark.parametrize("value", [None, 1, "x", [], [1], {}, {"prefill": 1}])
def test_parts_of_the_sidecar_that_are_something_else(folder: Path, name: str, value: Any) -> None:
    edit(folder, lambda c: c.update({name: value}))
    refuses(folder, "arkv.json")


def test_a_sidecar_without_end(folder: Path) -> None:
    (folder / "arkv.json").write_text("[" * 100_000)
    refuses(folder, "arkv.json: cannot be read")


def test_graphs_that_are_each_other(folder: Path) -> None:
    a, b, c = folder / "prefill.onnx", folder / "decode.onnx", folder / "x"
    a.rename(c), b.rename(a), c.rename(b)
    with pytest.warns(UserWarning, match="changed since the export"):
        refuses(folder, "prefill.onnx: not the graph that arkv.json tells of")
