"""Exported graphs in ONNX Runtime answer as the transformed model does, from the same state."""

from __future__ import annotations

from dataclasses import dataclass

import engine_cases as cases
import numpy as np
import onnx
import pytest
import torch
from engine_cases import CASES, STEPS

from arkv_fx import ArkvCache
from arkv_fx.runtime import OnnxSession

# The formats of the others are exported one by one in test_exported_formats.py, too.
OFTEN = ("llama", "mistral")
ARCHS = [pytest.param(a, marks=[] if a in OFTEN else [pytest.mark.slow]) for a in CASES]


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_tokens_are_those_of_the_transformed_model(arch: str) -> None:
    ids, mask = cases.prompt()
    expected = cases.transformed(arch).generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False
    )[:, ids.shape[1] :]
    assert len(expected.unique()) > 5, "a model that repeats itself tests nothing"
    found = cases.session(arch).generate(ids.numpy(), STEPS, mask=mask.numpy())
    assert found.tolist() == expected.tolist()


@dataclass
class Off:
    """How far steps from torch's own state are off: the largest difference of numbers (of masses in
    parts of each), and how many vectors of codes, scales and zeros are not the same bits, of how
    many that were written.
    """

    numbers: dict[str, float]
    vectors: int = 0
    written: int = 0

    def add(self, session: OnnxSession, cache: ArkvCache, written: int) -> None:
        expected = cases.signed(cases.exported_state(session, cache), session)
        found = session.state()
        for info in session.sidecar.tensors:
            a, b, name = found[info.input], expected[info.input], info.input
            if name.endswith(("codes", "scale", "zero")) and info.dtype not in WIDE:
                self.vectors += int((a != b).any(-1).sum())
                self.written += written * len(info.shape[:1])
            else:
                a, b = (x.astype(np.float64) for x in (a, b))
                size = np.maximum(np.abs(b), 2.0**-14) if name.endswith(".mass") else 1.0
                wide = float((np.abs(a - b) / size).max())
                self.numbers[name] = max(self.numbers.get(name, 0.0), wide)


WIDE = ("float32", "float16")


def differences(arch: str, damage: bool = False) -> Off:
    """A prefill, then each step from the state that torch's own has left."""
    model, session = cases.transformed(arch), cases.session(arch)
    ids, mask = cases.prompt()
    cache, off = ArkvCache(model), Off({"logits": 0.0})
    with torch.no_grad():
        call = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        logits = model(input_ids=ids, past_key_values=cache, **call).logits[:, -1]
        session.prefill(ids.numpy(), mask.numpy())
        off.add(session, cache, cases.BATCH * 2 * 18)
        for step in range(STEPS):
            seen = mask.sum(1) + step
            held = cases.signed(cases.exported_state(session, cache), session)
            if damage:
                codes = next(n for n in held if n.endswith("tier0.v.codes"))
                held[codes] = held[codes] * 0
            session.set_state(held, seen.numpy())
            new = logits.argmax(-1, keepdim=True)
            call = {"position_ids": seen[:, None]}
            logits = model(input_ids=new, past_key_values=cache, **call).logits[:, -1]
            found = session.step(new.numpy())
            wide = float(np.abs(found - logits.numpy()).max())
            off.numbers["logits"] = max(off.numbers["logits"], wide)
            off.add(session, cache, cases.BATCH * 2)
    return off


MOST = {
    ".pos": 0, ".count": 0, ".seen": 0, ".bad": 0, ".mass": 2**-10, ".novelty": 1,
}  # fmt: skip
"""What may be off: float16 and codes by one place; all else by 1e-4."""


@pytest.mark.parametrize("arch", ARCHS)
def test_every_step_leaves_the_state_that_the_reference_leaves(arch: str) -> None:
    off = differences(arch)
    for name, wide in off.numbers.items():
        assert wide <= MOST.get(name[name.rfind(".") :], 1e-4), name
    # A code or a scale may round the other way where float32 sums differ in their last bit.
    assert off.vectors <= 0.01 * off.written


def test_a_damaged_state_is_noticed() -> None:
    """Negative control: one tier's values are lost on the way."""
    off = differences("llama", damage=True)
    assert off.numbers["logits"] > 1e-3
    assert off.vectors > 0.01 * off.written


@pytest.mark.parametrize("arch", ARCHS)
def test_the_graphs_hold_the_planned_bytes_and_no_more(arch: str) -> None:
    planned = sum(plan.nbytes(cases.BATCH) for plan in cases.layer_plans(arch))
    decode = onnx.load(cases.folder(arch) / "decode.onnx", load_external_data=False)
    sizes = [
        onnx.helper.tensor_dtype_to_np_dtype(x.type.tensor_type.elem_type).itemsize
        * int(np.prod([d.dim_value for d in x.type.tensor_type.shape.dim]))
        for x in decode.graph.input
        if x.name.startswith("past_key_values.")
    ]
    session = cases.session(arch)
    assert sum(sizes) == planned == session.nbytes == session.sidecar.content["state_bytes"]
    assert [x.name for x in decode.graph.output] == [
        "logits", *(t.output for t in session.sidecar.tensors),
    ]  # fmt: skip


MOVES = {"Gather", "Slice", "Split", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
UNSIGNED = onnx.TensorProto.UINT8
READS = {"DequantizeLinear", "Where", "GatherND"}  # attention; the update; the token that leaves


def readers(graph: onnx.GraphProto, name: str) -> set[str]:
    """Kinds of nodes that read a tensor, through those that cut or rename it, or drop signs."""
    found: set[str] = set()
    for node in graph.node:
        if name in node.input:
            kinds = [x.i for x in node.attribute if x.name == "to"]
            bytes_only = node.op_type == "Cast" and kinds == [UNSIGNED]
            if node.op_type in MOVES or bytes_only:
                found |= {r for out in node.output for r in readers(graph, out)}
            else:
                found.add(node.op_type)
    return found


def code_inputs(arch: str) -> dict[str, set[str]]:
    decode = onnx.load(cases.folder(arch) / "decode.onnx", load_external_data=False)
    names = [t.input for t in cases.session(arch).sidecar.tensors if t.input.endswith(".codes")]
    kinds = {t.input: t.dtype for t in cases.session(arch).sidecar.tensors}
    return {
        name: readers(decode.graph, name)
        for name in names
        if kinds[name] in ("int8", "float8_e4m3fn")
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_codes_are_read_by_dequantization_alone(arch: str) -> None:
    """No chain of casts and products: only that a runtime can fuse into the attention."""
    found = code_inputs(arch)
    assert found
    for name, kinds in found.items():
        assert "DequantizeLinear" in kinds, name
        assert kinds <= READS, name


@pytest.mark.parametrize("arch", ARCHS)
def test_dequantized_codes_are_not_kept(arch: str) -> None:
    """What a step gives back is as small as what it takes: nothing wide among its outputs."""
    decode = onnx.load(cases.folder(arch) / "decode.onnx", load_external_data=False)
    kinds = {x.name: x.type.tensor_type.elem_type for x in decode.graph.input}
    for x in decode.graph.output[1:]:
        assert x.type.tensor_type.elem_type == kinds["past_key_values" + x.name[len("present") :]]


PORTABLE = {"FLOAT", "FLOAT16", "INT64", "INT32", "INT8"}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_binding_has_the_dtypes_of_inputs_and_outputs(arch: str) -> None:
    """Plain ``session.run`` hands over all of them; formats with bfloat16 and float8 are there."""
    for name in ("prefill", "decode"):
        graph = onnx.load(cases.folder(arch) / f"{name}.onnx", load_external_data=False).graph
        kinds = {x.type.tensor_type.elem_type for x in (*graph.input, *graph.output)}
        assert {onnx.TensorProto.DataType.Name(k) for k in kinds} <= PORTABLE
    held = {t.bytes_of for t in cases.session(arch).sidecar.tensors}
    assert held == {"", "bfloat16", *(["float8_e4m3fn"] if "fp8" in CASES[arch] else [])}


def test_rotations_are_named() -> None:
    """So that a quantizer can leave them out: the matrices, and all that multiplies by them."""
    for name in ("prefill", "decode"):
        graph = onnx.load(cases.folder("llama") / f"{name}.onnx").graph
        named = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        rotations = {n: x for n, x in named.items() if "hadamard" in n}
        assert rotations
        for matrix in rotations.values():
            assert np.allclose(matrix @ matrix, np.eye(len(matrix)), atol=1e-6)
        readers = [n.name for n in graph.node if set(n.input) & set(rotations)]
        assert readers and all("hadamard" in name for name in readers)


@pytest.mark.parametrize("arch", ARCHS)
def test_layers_of_one_plan_are_stacked(arch: str) -> None:
    groups = cases.session(arch).sidecar.content["groups"]
    expected = [[0], [1]] if arch == "gemma3" else [[0, 1]]  # gemma3's layers differ
    assert [g["layers"] for g in groups] == expected


def test_the_files_pass_the_full_check_and_share_their_weights() -> None:
    folder = cases.folder("llama")
    for name in ("prefill", "decode"):
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
        loaded = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert loaded.opset_import[0].version == 21
        held = {t.name for t in loaded.graph.initializer}
        assert "model.layers.0.mlp.up_proj.weight.T" in held  # folded, and still called so
    parameters = sum(p.numel() * 4 for p in cases.model("llama").parameters())
    size = (folder / "weights.data").stat().st_size
    assert parameters * 0.95 < size < parameters * 1.1
