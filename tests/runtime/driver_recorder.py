"""The libraries of a GPU without one: memory of the host, and ONNX Runtime where engines would run.

``CudaDevice`` runs as it is. Arguments go to the real library first, which takes or refuses their
kinds before it finds no driver. What is queued happens when somebody waits, in order, as late as it
may on a GPU; a captured run keeps the addresses that were bound when it was captured.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from arkv_fx.runtime import read_sidecar
from arkv_fx.runtime.digests import said_of

DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8_e4m3fn": "FP8"}


class Driver:
    """What happened: ``calls`` by name, ``memory`` by address; ``major`` and ``minor`` of the GPU.

    Args:
        folder: whose engines can be loaded.
        takes_graphs: whether runs can be captured.
    """

    major, minor = 8, 9

    def __init__(self, folder: Path, takes_graphs: bool = True) -> None:
        self.folder, self.takes_graphs = folder, takes_graphs
        self.content: dict[str, Any] = json.loads((folder / "arkv.json").read_text())
        self.calls: Counter[str] = Counter()
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.loaded = 0
        real = import_module("tensorrt_rtx")
        log = SimpleNamespace(ILogger=real.ILogger, Runtime=lambda log: Runtime(self, log))
        self.packages: dict[str, Any] = {"cuda.bindings.runtime": Cuda(self), "tensorrt_rtx": log}

    def at(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the memory, which lie within what was allocated at once."""
        for begin, held in self.memory.items():
            if begin <= address <= address + nbytes <= begin + held.nbytes:
                return held[address - begin : address - begin + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address} are not allocated")

    def put(self, job: Callable[[], None]) -> None:
        """Queue a job, or draw it into the graph that is captured."""
        (self.queue if self.captured is None else self.captured).append(job)


class Cuda:
    """``cuda.bindings.runtime``: every function gives its status, and what it made."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._real = import_module("cuda.bindings.runtime")
        self._no_driver = int(self._real.cudaGetDeviceCount()[0]) != 0
        for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaDeviceAttr"):
            setattr(self, kind, getattr(self._real, kind))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        own = getattr(Cuda, f"_{name}", None)

        def call(*arguments: Any) -> Any:
            if self._no_driver:
                assert int(getattr(self._real, name)(*arguments)[0]) != 0
            self._driver.calls[name] += 1
            found = own(self, *arguments) if own else None
            return (self._real.cudaError_t.cudaSuccess, *([] if found is None else [found]))

        assert hasattr(self._real, name), name
        return call

    def _cudaGetDeviceCount(self) -> int:
        return 1

    def _cudaDeviceGetAttribute(self, kind: Any, index: int) -> int:
        return self._driver.major if kind.name.endswith("Major") else self._driver.minor

    def _cudaStreamCreate(self) -> Any:
        return self._real.cudaStream_t(77)

    def _cudaMalloc(self, nbytes: int) -> int:
        held = np.full(nbytes, 0xA5, np.uint8)  # nobody promised zeros
        self._driver.memory[held.ctypes.data] = held
        return held.ctypes.data

    def _cudaFree(self, address: int) -> None:
        del self._driver.memory[address]

    def _cudaMemsetAsync(self, address: int, byte: int, nbytes: int, stream: Any) -> None:
        assert int(stream) == 77
        self._driver.put(lambda: self._driver.at(address, nbytes).fill(byte))

    def _cudaMemcpyAsync(
        self, to: int, source: int, nbytes: int, kind: Any, stream: Any
    ) -> None:  # fmt: skip
        assert int(stream) == 77
        self._driver.at(to if kind.name.endswith("HostToDevice") else source, nbytes)
        self._driver.put(lambda: ctypes.memmove(to, source, nbytes) and None)

    def _cudaStreamSynchronize(self, stream: Any) -> None:
        jobs, self._driver.queue = self._driver.queue, []
        for job in jobs:
            job()

    def _cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        self._driver.captured = []

    def _cudaStreamEndCapture(self, stream: Any) -> Any:
        jobs, self._driver.captured = self._driver.captured, None
        handle = len(self._driver.graphs) + 1
        self._driver.graphs[handle] = jobs or []
        return self._real.cudaGraph_t(handle)

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return self._real.cudaGraphExec_t(int(graph))

    def _cudaGraphExecDestroy(self, graph: Any) -> None:
        del self._driver.graphs[int(graph)]

    def _cudaGraphLaunch(self, graph: Any, stream: Any) -> None:
        self._driver.queue += self._driver.graphs[int(graph)]


class Runtime:
    """``tensorrt_rtx.Runtime``: knows the engines of the folder by their bytes."""

    def __init__(self, driver: Driver, log: Any) -> None:
        self._driver, self._log = driver, log

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        for entry in self._driver.content["engines"]:
            file = (self._driver.folder / entry["file"]).read_bytes()
            if hashlib.sha256(file).digest() == hashlib.sha256(plan).digest():
                return Engine(self._driver, entry, self._log)
        self._log.log(import_module("tensorrt_rtx").ILogger.Severity.ERROR, "no engine of mine")
        return None


class Engine:
    """``ICudaEngine``: its description is the builder's own, read from the network it built."""

    def __init__(self, driver: Driver, entry: Mapping[str, Any], log: Any) -> None:
        self.driver, self.entry, self.log = driver, entry, log
        self._real = import_module("tensorrt_rtx")
        self._names = [*entry["inputs"], *entry["outputs"]]
        driver.loaded += 1

    def __del__(self) -> None:
        self.driver.loaded -= 1

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._real.TensorIOMode
        return modes.INPUT if name in self.entry["inputs"] else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        said = {**self.entry["inputs"], **self.entry["outputs"]}[name]
        return getattr(self._real.DataType, DTYPES.get(said, said.upper()))

    def get_tensor_shape(self, name: str) -> Any:
        return self._real.Dims(self.entry["shapes"][name])

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    """``IExecutionContext``: a run reads and writes the addresses that are bound."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._driver, self._entry = engine, engine.driver, engine.entry
        self._bound: dict[str, int] = {}
        self._shapes = {n: tuple(s) for n, s in self._entry["shapes"].items()}
        graph = self._driver.content["graphs"][self._entry["graph"]]
        self._session = onnxruntime.InferenceSession(str(self._driver.folder / graph["file"]))
        self._tensors = read_sidecar(self._driver.folder).tensors

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._bound[name] = address
        return name in self._entry["shapes"]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return self._entry["least"] <= shape[1] <= self._entry["longest"]

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77 and {*self._bound} == {*self._entry["shapes"]}
        if self._driver.captured is not None and not self._driver.takes_graphs:
            severity = import_module("tensorrt_rtx").ILogger.Severity.ERROR
            self._engine.log.log(severity, "cannot be captured")
            return False
        bound, shapes = dict(self._bound), dict(self._shapes)
        self._driver.put(lambda: self._run(bound, shapes))
        return True

    def _pieces(self, name: str, bound: Mapping[str, int]) -> list[int]:
        """Where the layers of a state tensor of ``arkv.json`` lie."""
        state = {(of, place): bound[n] for n, (of, place) in self._entry["state"].items()}
        return [state[key] for key in sorted(state) if key[0] == name]

    def _run(self, bound: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        feeds, read, written = {}, set(), set()
        for name in (value.name for value in self._session.get_inputs()):
            info = next((t for t in self._tensors if t.input == name), None)
            if info is None:
                count = int(np.prod(shapes[name]))
                flat = self._driver.at(bound[name], count * 8).view(np.int64)
                feeds[name] = flat.reshape(shapes[name]).copy()
                continue
            places = self._pieces(name, bound)
            size = info.nbytes // len(places)
            parts = [self._driver.at(place, size) for place in places]
            feeds[name] = np.concatenate(parts).view(info.dtype).reshape(info.shape)
            read |= {*places}
        outputs = ["logits", *(t.output for t in self._tensors)]
        logits, *state = self._session.run(outputs, feeds)
        self._driver.at(bound["logits"], logits.nbytes)[:] = logits.reshape(-1).view(np.uint8)
        for info, array in zip(self._tensors, state, strict=True):
            places = self._pieces(info.output, bound)
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for place, part in zip(places, flat.reshape(len(places), -1), strict=True):
                self._driver.at(place, part.nbytes)[:] = part
            written |= {*places}
        assert not read & written, "an engine reads what it writes"


def add_engines(folder: Path, capability: str, longest: int) -> None:
    """Let an ONNX folder tell of engines of its graphs, as the builder would tell of them."""
    content: dict[str, Any] = json.loads((folder / "arkv.json").read_text())
    batch, vocabulary = content["batch"], content["model"]["vocabulary"]
    tensors = [t for group in content["groups"] for t in group["tensors"]]
    native = {"float8_e4m3fn": 1, "bfloat16": 2}
    content["engines"] = []
    for graph in ("prefill", "decode"):
        state = {t["output"]: t for t in tensors}
        given = {t["input"]: t for t in tensors} if graph == "decode" else {}
        plain = [name for name in content["graphs"][graph]["inputs"] if name not in given]
        kinds = {n: t["bytes_of"] or t["dtype"] for n, t in {**given, **state}.items()}
        shapes = {
            n: [*t["shape"][:-1], t["shape"][-1] // native.get(t["bytes_of"], 1)]
            for n, t in {**given, **state}.items()
        }
        file = f"{graph}.{capability}.engine"
        (folder / file).write_bytes(file.encode())
        content["files"][file] = said_of(folder / file)
        content["engines"].append({
            "file": file, "graph": graph, "capability": capability, "least": 1, "longest": longest,
            "inputs": dict.fromkeys(plain, "int64") | {n: kinds[n] for n in given},
            "outputs": {"logits": "float32"} | {n: kinds[n] for n in state},
            "shapes": shapes | {"logits": [batch, 1, vocabulary]}
            | {n: [batch, 1 if graph == "decode" else -1] for n in plain},
            "state": {n: [n, 0] for n in shapes},
        })  # fmt: skip
    for entry in content["engines"][1:]:
        del entry["least"], entry["longest"]
    (folder / "arkv.json").write_text(json.dumps(content))
