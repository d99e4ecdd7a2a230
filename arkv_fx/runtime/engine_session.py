"""``EngineSession``: text from the TensorRT engines in an exported folder, on their GPU."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from arkv_fx.errors import EngineError
from arkv_fx.logs import get_logger
from arkv_fx.runtime.cuda_device import CudaDevice
from arkv_fx.runtime.engine_files import EngineFile, engine_for, require_engines
from arkv_fx.runtime.engine_state import EngineState
from arkv_fx.runtime.graph_session import GraphSession, Logits, State
from arkv_fx.runtime.manifest import read_description
from arkv_fx.runtime.token_ids import Tokens

LOG = get_logger("runtime")
LOGITS = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
"""What logits of a dtype are copied into; numpy knows the bits of bfloat16 only."""


class EngineSession(GraphSession):
    """``OnnxSession``'s twin over TensorRT for RTX: one batch of sequences of an exported model.

    The state stays on the GPU, in two sets of buffers: a step reads one and writes the other. Only
    token ids and positions go in, only logits and a flag for each group of layers come out. From
    the third step on a step is a CUDA graph, where the runtime takes one; else a line of the log
    (``ARKV_LOG=info``) says why it is not. Each session loads the engines by itself, with weights;
    what it holds on the GPU is given back when it goes. Threads: as for ``OnnxSession``.

    Args:
        folder: what ``arkv_fx.export(..., target="tensorrt")`` wrote, with engines for this GPU.
        device: the GPU's number.
        cuda_graph: whether steps may be CUDA graphs.

    Raises:
        EngineError: if the folder is damaged or holds no engines for this GPU; if a package, a
            driver or a GPU is missing.
    """

    def __init__(
        self, folder: str | PathLike[str], *, device: int = 0, cuda_graph: bool = True
    ) -> None:
        if not isinstance(folder, str | PathLike):
            raise EngineError(f"folder={folder!r}: give a path")
        if type(device) is not int or device < 0:
            raise EngineError(f"device={device!r}: must be a whole number >= 0")
        if type(cuda_graph) is not bool:
            raise EngineError(f"cuda_graph={cuda_graph!r}: must be True or False")
        sidecar = read_description(folder)
        try:
            self._device = CudaDevice(device)
        except EngineError:  # what the folder lacks is said before what the machine lacks
            require_engines(sidecar)
            raise
        prefill, decode = (
            engine_for(sidecar, name, self._device.capability) for name in ("prefill", "decode")
        )
        self.least, self.longest = prefill.least, prefill.longest
        self._device.open()
        finalize(self, self._device.close)
        self._prefill, self._decode = (_Engine(self._device, file) for file in (prefill, decode))
        self._state = EngineState(self._device, sidecar.tensors, decode)
        self._capture = cuda_graph
        self._graphs: dict[int, Any] = {}  # by the set of buffers that is read
        self._ran: set[int] = set()
        super().__init__(sidecar)

    def _empty(self) -> None:
        self._state.empty()

    def _put(self, state: State) -> None:
        self._state.put(state)

    def _copy(self) -> State:
        return self._state.copy()

    def _prompt(self, given: Mapping[str, Tokens]) -> Logits:
        fed = self._prefill.feed(given)
        for name, tokens in given.items():
            self._prefill.context.shape(name, tokens.shape)
        self._state.bind(self._prefill.context, self._prefill.file)
        self._device.launch(self._prefill.context)
        return self._finish(self._prefill, fed)

    def _token(self, given: Mapping[str, Tokens]) -> Logits:
        fed = self._decode.feed(given)
        self._launch_step()
        return self._finish(self._decode, fed)

    def _launch_step(self) -> None:
        """A step from the buffers that are held into the others, by their CUDA graph or plainly.

        The first step of each direction is plain: an engine may still set itself up in it.
        """
        side = self._state.held
        if side not in self._graphs:
            self._state.bind(self._decode.context, self._decode.file)
            if not (self._capture and side in self._ran):
                self._device.launch(self._decode.context)
                self._ran.add(side)
                return
            try:
                self._graphs[side] = self._device.capture(self._decode.context)
            except EngineError as error:
                LOG.info("steps are launched one by one, not as a CUDA graph: %s", error)
                self._capture = False
                self._device.launch(self._decode.context)
                return
        self._device.replay(self._graphs[side])

    def _finish(self, engine: _Engine, fed: list[NDArray[Any]]) -> Logits:
        """What a run gave; ``fed`` is what goes in, and stays until it has gone."""
        engine.queue_logits()
        self._state.queue_flags()
        self._device.wait()
        del fed
        self._state.refuse_spoilt()
        self._state.swap()
        return engine.logits()


class _Engine:
    """An engine with buffers for all that goes in and comes out but the state."""

    def __init__(self, device: CudaDevice, file: EngineFile) -> None:
        self._device, self.file = device, file
        self.context = device.load(file.path)
        file.check(self.context.bindings)
        self._inputs = {
            name: device.allocate(abs(binding.nbytes) * file.longest)
            for name, binding in file.bindings.items()
            if binding.given and name not in file.pieces.values()
        }
        logits = file.bindings["logits"]
        if logits.dtype not in LOGITS:
            raise EngineError(f"{file.path}: logits in {logits.dtype}; export again")
        self._host = np.zeros(logits.shape, LOGITS[logits.dtype])
        self._logits = device.allocate(logits.nbytes)
        for name, address in {**self._inputs, "logits": self._logits}.items():
            self.context.bind(name, address)

    def feed(self, given: Mapping[str, Tokens]) -> list[NDArray[Any]]:
        """Queue the copying of inputs: the arrays that are copied."""
        arrays = {name: np.ascontiguousarray(x) for name, x in given.items()}
        for name, array in arrays.items():
            self._device.upload(self._inputs[name], array)
        return [*arrays.values()]

    def queue_logits(self) -> None:
        """Queue the copying of logits."""
        self._device.download(self._host, self._logits)

    def logits(self) -> Logits:
        """What was copied [B, vocabulary]."""
        last = self._host[:, -1]
        if self.file.bindings["logits"].dtype == "bfloat16":
            return (last.astype(np.uint32) << 16).view(np.float32)
        return last.astype(np.float32)
