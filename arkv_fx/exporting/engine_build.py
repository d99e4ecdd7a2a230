"""Build one TensorRT engine from an ONNX file: run in a process of its own.

A graph that TensorRT does not like may end the process, so whoever wants an engine starts
``python -P engine_build.py GRAPH ENGINE CAPABILITY [LEAST MOST]`` and reads one line of JSON.
Needs no GPU.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

FLOATING = {"Float", "Half", "BFloat16"}
LAYER = re.compile(r"^Name: .*?, LayerType: (?P<type>\w+), .* Outputs: \[(?P<outputs>.*?)\], Tac")
OUTPUT = re.compile(
    r"Name: (?P<name>\S+), Dimensions: \[(?P<dims>[\d,]*)\].*?Datatype: (?P<dtype>\w+)"
)


def build(
    graph: Path, engine: Path, capability: str, least: int = 0, most: int = 0
) -> dict[str, Any]:
    """Write ``engine`` and say what it is made of.

    Args:
        least: the fewest and ``most`` the most tokens of inputs [batch, tokens] of any length.

    Returns:
        Seconds, bytes, kernels by type, the numbers in the largest floating-point tensor that one
        kernel writes for another, and of what goes in and comes out TensorRT's names of the dtypes
        and the shapes, -1 for what is of any length; or the ``error``.
    """
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines += message.split("\n")
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    began = time.perf_counter()
    if not parser.parse_from_file(str(graph)):
        return {"error": "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))}
    settings = builder.create_builder_config()
    settings.num_compute_capabilities = 1
    settings.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if any(-1 in tuple(x.shape) for x in inputs):
        profile = builder.create_optimization_profile()
        for x in inputs:
            sizes = [
                [n if d == -1 else d for d in x.shape] for n in (least, (least + most) // 2, most)
            ]
            profile.set_shape(x.name, *sizes)
        settings.add_optimization_profile(profile)
    given = [network.get_output(i) for i in range(network.num_outputs)]
    outputs = [_fixed(network, x) for x in given]
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        return {"error": "; ".join(log.errors[-3:]) or "the builder gave no reason"}
    engine.write_bytes(plan)
    layers = [found for line in log.lines if (found := LAYER.match(line))]
    ours = {x.name for x in outputs}
    written = [
        math.prod(map(int, found["dims"].split(",")))
        for layer in layers
        for found in OUTPUT.finditer(layer["outputs"])
        if found["dtype"] in FLOATING and found["dims"] and found["name"] not in ours
    ]
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "bytes": plan.nbytes,
        "kernels": dict(Counter(layer["type"] for layer in layers)),
        "largest": max(written, default=0),
        "inputs": {x.name: x.dtype.name for x in inputs},
        "outputs": {x.name: x.dtype.name for x in outputs},
        "shapes": {x.name: list(x.shape) for x in (*inputs, *outputs)},
    }


def _fixed(network: Any, output: Any) -> Any:
    """The output with one in place of what TensorRT takes for any length.

    Only the prompt varies; of its logits the last token's are cut out, and TensorRT does not see
    that this is one. Whoever runs the engine has a buffer for so many.
    """
    if -1 not in tuple(output.shape):
        return output
    name, output.name = output.name, f"{output.name}.free"
    network.unmark_output(output)
    layer = network.add_shuffle(output)
    layer.reshape_dims = [1 if size == -1 else size for size in output.shape]
    found = layer.get_output(0)
    found.name = name
    network.mark_output(found)
    return found


if __name__ == "__main__":
    given, made, *rest = sys.argv[1:]
    print(json.dumps(build(Path(given), Path(made), rest[0], *map(int, rest[1:]))))
