"""Build one TensorRT engine from an ONNX file: run in a process of its own.

A graph that TensorRT does not like may end the process, so whoever wants an engine starts
``python -P engine_build.py GRAPH ENGINE CAPABILITY`` and reads one line of JSON. Needs no GPU.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}
LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), (?P<rest>.*)$")


def build(graph: Path, engine: Path, capability: str) -> dict[str, Any]:
    """Write ``engine`` and say what it is made of: kernels by type, dtypes of its inputs."""
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
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        return {"error": "; ".join(log.errors[-3:]) or "the builder gave no reason"}
    engine.write_bytes(plan)
    layers = [found for line in log.lines if (found := LAYER.match(line))]
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "bytes": plan.nbytes,
        "kernels": dict(Counter(layer["type"] for layer in layers)),
        "inputs": {x.name: DTYPES.get(x.dtype.name, x.dtype.name.lower()) for x in inputs},
    }


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
