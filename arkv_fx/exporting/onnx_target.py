"""Target "onnx": ``prefill.onnx`` and ``decode.onnx`` (opset 21) over one file of weights."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arkv_fx.errors import ExportError
from arkv_fx.exporting.onnx_borders import name_rotations, pad_prompt
from arkv_fx.exporting.programs import TOKENS, Graph, Programs
from arkv_fx.exporting.target import Target
from arkv_fx.runtime.digests import said_of
from arkv_fx.runtime.manifest import METADATA, OPSET

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHTS = "weights.data"
INLINE = 1024  # bytes up to which a constant stays in the graph's own file


def write(
    folder: Path, programs: Programs, sidecar: dict[str, Any], progress: Callable[[str], None]
) -> None:
    """Translate, fold constants, share the weights, and check what was written.

    Raises:
        ExportError: if the packages are missing or an operator has no translation.
    """
    write_graphs(folder, {graph.name: graph for graph in programs.graphs}, sidecar, progress)


def write_graphs(
    folder: Path, graphs: Mapping[str, Graph], sidecar: dict[str, Any],
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Write each graph as ``NAME.onnx``, all over one file of weights; see ``write``."""
    require("onnx", "onnxscript")
    import onnx
    import onnx_ir as ir

    from arkv_fx.exporting.translations import PORTABLE, TABLE

    models = {}
    for name, graph in graphs.items():
        progress(f"translate the {name} graph")
        models[name] = _translate(graph, PORTABLE if name in sidecar["graphs"] else TABLE)
        if name in sidecar["graphs"]:
            sidecar["graphs"][name]["file"] = f"{name}.onnx"
            if name == "prefill" and "attention_mask" in graph.inputs:
                pad_prompt(models[name], sidecar["batch"], sidecar["least_prompt"], TOKENS)
                sidecar["least_prompt"] = 1
    sidecar["opset"] = OPSET
    sidecar["versions"] |= {"onnx": onnx.__version__}
    progress("write the weights")
    share_weights(list(models.values()), folder)
    text = json.dumps(sidecar, sort_keys=True)
    for name, model in models.items():
        progress(f"write and check {name}.onnx")
        model.metadata_props[METADATA] = text
        model.producer_name, model.producer_version = "arkv_fx", sidecar["versions"]["arkv-fx"]
        ir.save(model, folder / f"{name}.onnx")
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
    own = [folder / graph["file"] for graph in sidecar["graphs"].values()]
    sidecar["files"] = {path.name: said_of(path) for path in [*own, folder / WEIGHTS]}


def require(*packages: str) -> None:
    """Refuse to begin without ``packages``.

    Raises:
        ExportError: naming those that are missing.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ExportError(
            f"this target needs {', '.join(missing)}: pip install -c constraints.txt "
            '"arkv-fx[export]"'
        )


def _translate(graph: Graph, table: Mapping[Any, Any]) -> ir.Model:
    from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it names packages that it would like to see
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not optimize=True: it takes more than 20 minutes on 30 layers.
            program = torch.onnx.export(
                graph.program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                custom_translation_table=dict(table), input_names=list(graph.inputs),
                output_names=graph.outputs,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise ExportError(f"the {graph.name} graph has no ONNX form: {cause}") from error
    finally:
        exporter.setLevel(level)
    if program is None:
        raise ExportError(f"the {graph.name} graph has no ONNX form: torch.onnx.export gave none")
    model = program.model
    _name_weights(model, graph)
    fold_constants(model)
    RemoveUnusedNodesPass()(model)
    DeduplicateInitializersPass()(model)
    name_rotations(model)
    for node in model.graph:  # what PyTorch noted for its own error reports: most of the file
        node.metadata_props.clear()
    return model


def _name_weights(model: ir.Model, graph: Graph) -> None:
    """Call each weight what the model calls it, also when folding will have transposed it."""
    held = model.graph.initializers
    for attribute, name in graph.weights.items():
        if attribute in held:
            value = held[attribute]
            value.name = name
            for index, use in enumerate(value.uses()):
                if use.node.op_type == "Transpose":
                    use.node.outputs[0].name = f"{name}.T" + (f".{index}" if index else "")


def share_weights(models: Sequence[ir.Model], folder: Path) -> None:
    """Write every large constant of the models once, into one file."""
    import onnx_ir as ir

    owners: dict[bytes, list[ir.Value]] = {}
    for model in models:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > INLINE:
                digest = hashlib.sha256(str((tensor.dtype, tensor.shape)).encode())
                digest.update(tensor.tobytes())
                owners.setdefault(digest.digest(), []).append(value)
    firsts = [values[0].const_value for values in owners.values()]
    external = ir.external_data.convert_tensors_to_external(
        [tensor for tensor in firsts if tensor is not None], folder, WEIGHTS
    )
    for values, tensor in zip(owners.values(), external, strict=True):
        for value in values:
            value.const_value = tensor


TARGET = Target("onnx", write, portable=True, lacking=(torch.bfloat16,))
