"""One GPU as engines need it: memory by address, one stream, TensorRT's engines, CUDA graphs.

All that ``EngineSession`` asks of a driver is asked here; the tests put another class in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from arkv_fx.errors import EngineError
from arkv_fx.logs import get_logger
from arkv_fx.runtime.engine_files import Binding, dtype_name

INSTALL = 'pip install -c constraints.txt "arkv-fx[tensorrt]"'


class CudaDevice:
    """A GPU by its number. What is queued runs in order; ``wait`` waits for all of it.

    Attributes:
        capability: "SM89" and so on.

    Raises:
        EngineError: if a package is missing, there is no such GPU or no driver; here, and from
            every method if the GPU fails.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda = _package("cuda.bindings.runtime", "cuda-bindings")
        self._tensorrt = _package("tensorrt_rtx", "tensorrt-rtx")
        self._index = index
        try:
            count = self._do("cudaGetDeviceCount")
        except EngineError as error:
            raise EngineError(f"engines need an NVIDIA GPU and its driver: {error}") from None
        if not 0 <= index < count:
            raise EngineError(f"device={index}: there are {count} GPUs, counted from 0")
        kind = self._cuda.cudaDeviceAttr
        major, minor = (
            self._do(
                "cudaDeviceGetAttribute",
                getattr(kind, f"cudaDevAttrComputeCapability{part}"),
                index,
            )
            for part in ("Major", "Minor")
        )
        self.capability = f"SM{major}{minor}"
        self._addresses: list[int] = []
        self._graphs: list[Any] = []
        self._contexts: list[Context] = []
        self._stream: Any = None
        self._runtime: Any = None

    def open(self) -> None:
        """Begin to use the GPU, until ``close``."""
        self._on("cudaSetDevice", self._index)
        self._stream = self._on("cudaStreamCreate")
        self._log = _log(self._tensorrt)
        self._runtime = self._tensorrt.Runtime(self._log)

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes, which are there until ``close``."""
        address = int(self._on("cudaMalloc", max(nbytes, 1)))
        self._addresses.append(address)
        return address

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """Queue the setting of every byte."""
        self._on("cudaMemsetAsync", address, byte, nbytes, self._stream)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy to the GPU; the array, contiguous, stays as it is until ``wait``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._on("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy from the GPU into a contiguous array, which is whole after ``wait``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._on("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def wait(self) -> None:
        """Until all that was queued is done."""
        self._on("cudaStreamSynchronize", self._stream)

    def load(self, path: Path) -> Context:
        """The engine in a file, ready to run."""
        self._on("cudaSetDevice", self._index)
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        context = engine.create_execution_context() if engine is not None else None
        if context is None:
            raise EngineError(f"{path}: TensorRT cannot load it: {self._log.said()}")
        self._contexts.append(Context(path, engine, context, self._log))
        return self._contexts[-1]

    def launch(self, context: Context) -> None:
        """Queue a run."""
        self._on("cudaSetDevice", self._index)
        context.run(int(self._stream))

    def capture(self, context: Context) -> Any:
        """A CUDA graph of a run with the addresses that are bound; nothing is run by it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._on("cudaStreamBeginCapture", self._stream, mode)
        try:
            context.run(int(self._stream))
        except EngineError:
            self._cuda.cudaStreamEndCapture(self._stream)
            raise
        drawn = self._on("cudaStreamEndCapture", self._stream)
        try:
            graph = self._on("cudaGraphInstantiate", drawn, 0)
        finally:
            self._cuda.cudaGraphDestroy(drawn)
        self._graphs.append(graph)
        return graph

    def replay(self, graph: Any) -> None:
        """Queue the run that was captured."""
        self._on("cudaGraphLaunch", graph, self._stream)

    def close(self) -> None:
        """Give everything back; what was allocated and loaded must not be used again."""
        if self._stream is None:
            return
        for name, things in (
            ("cudaSetDevice", [self._index]),
            ("cudaStreamSynchronize", [self._stream]),
            ("cudaGraphExecDestroy", self._graphs),
        ):
            for thing in things:
                getattr(self._cuda, name)(thing)
        for context in self._contexts:
            context.drop()
        self._runtime = None
        for address in self._addresses:
            self._cuda.cudaFree(address)
        self._cuda.cudaStreamDestroy(self._stream)
        self._stream = None
        self._addresses, self._graphs, self._contexts = [], [], []

    def _on(self, name: str, *arguments: Any) -> Any:
        """Call the runtime on this GPU: which one is meant is a matter of each thread."""
        self._do("cudaSetDevice", self._index)
        return self._do(name, *arguments)

    def _do(self, name: str, *arguments: Any) -> Any:
        status, *found = getattr(self._cuda, name)(*arguments)
        if int(status):
            said = self._cuda.cudaGetErrorString(status)[1]
            raise EngineError(f"{name}: {said.decode()} ({status.name})")
        return found[0] if found else None


class Context:
    """An engine that can run; what it reads and writes is bound by name."""

    def __init__(self, path: Path, engine: Any, context: Any, log: Any) -> None:
        self._path, self._engine, self._context, self._log = path, engine, context, log

    @property
    def bindings(self) -> Mapping[str, Binding]:
        """What it takes and gives, as the runtime says."""
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        return {
            name: Binding(
                engine.get_tensor_mode(name).name == "INPUT",
                dtype_name(engine.get_tensor_dtype(name).name),
                tuple(engine.get_tensor_shape(name)),
            )
            for name in names
        }

    def bind(self, name: str, address: int) -> None:
        """Let a tensor lie at an address."""
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"{self._path}: no address for {name}: {self._log.said()}")

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Say how large an input of any length is."""
        if not self._context.set_input_shape(name, shape):
            raise EngineError(f"{self._path}: {name} cannot be {shape}: {self._log.said()}")

    def run(self, stream: int) -> None:
        """Queue a run on a stream."""
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"{self._path}: TensorRT does not run it: {self._log.said()}")

    def drop(self) -> None:
        """Let go of it, the context before the engine."""
        self._context = None
        self._engine = None


def _package(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # a library that does not load raises whatever it likes
        raise EngineError(
            f"running engines needs {name} ({type(error).__name__}: {error}): {INSTALL}"
        ) from error


def _log(tensorrt: Any) -> Any:
    """TensorRT's messages to our logger; it keeps the last errors, for ours."""
    logger = get_logger("tensorrt")

    class Log(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= tensorrt.ILogger.Severity.ERROR:
                self.errors = [*self.errors[-2:], message]
                logger.info("%s", message)
            else:
                logger.debug("%s", message)

        def said(self) -> str:
            """The last errors, which are then forgotten."""
            said, self.errors = "; ".join(self.errors), []
            return said or "it gave no reason"

    return Log()
