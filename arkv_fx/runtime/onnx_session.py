"""``OnnxSession``: text from an exported folder with ONNX Runtime and numpy, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from arkv_fx.errors import EngineError
from arkv_fx.runtime.graph_session import GraphSession, Logits, State
from arkv_fx.runtime.manifest import read_sidecar
from arkv_fx.runtime.shared import open_graph
from arkv_fx.runtime.tensors import empty, refuse_spoilt
from arkv_fx.runtime.token_ids import Tokens


class OnnxSession(GraphSession):
    """One batch of sequences of an exported model.

    Threads may share a session: a call waits until another's is done. A stream that another call
    broke into says so instead of going on over the other's sequences. Sessions of one folder share
    its weights, and run side by side.

    Args:
        folder: what ``arkv_fx.export(..., target="onnx")`` wrote. Graphs that were rewritten since
            run under a warning until they are signed, see ``sign``.
        threads: of ONNX Runtime; 0 for its own choice.

    Raises:
        EngineError: if the folder is damaged or ONNX Runtime cannot run it.
    """

    def __init__(self, folder: str | PathLike[str], *, threads: int = 0) -> None:
        if not isinstance(folder, str | PathLike):
            raise EngineError(f"folder={folder!r}: give a path")
        if type(threads) is not int or threads < 0:
            raise EngineError(f"threads={threads!r}: must be a whole number >= 0")
        sidecar = read_sidecar(Path(folder))
        self.least = sidecar.least_prompt
        self._runtime = _onnxruntime()
        self._prefill, self._decode = (
            open_graph(
                self._runtime, sidecar.graph(name), sidecar.content["graphs"][name]["inputs"],
                threads,
            )
            for name in ("prefill", "decode")
        )  # fmt: skip
        self._outputs = ["logits", *(t.output for t in sidecar.tensors)]
        super().__init__(sidecar)

    def _empty(self) -> None:
        self._put([empty(t) for t in self.sidecar.tensors])

    def _put(self, state: State) -> None:
        self._state = [self._runtime.OrtValue.ortvalue_from_numpy(x) for x in state]

    def _copy(self) -> State:
        # An OrtValue's array may look into memory that ends with it.
        return [value.numpy().copy() for value in self._state]

    def _prompt(self, given: Mapping[str, Tokens]) -> Logits:
        return self._run(self._prefill, given, {})

    def _token(self, given: Mapping[str, Tokens]) -> Logits:
        state = {t.input: x for t, x in zip(self.sidecar.tensors, self._state, strict=True)}
        return self._run(self._decode, given, state)

    def _run(self, session: Any, given: Mapping[str, Tokens], state: dict[str, Any]) -> Logits:
        value = self._runtime.OrtValue.ortvalue_from_numpy
        feeds = {name: value(np.ascontiguousarray(x)) for name, x in given.items()}
        logits, *new = session.run_with_ort_values(self._outputs, {**feeds, **state})
        for info, tensor in zip(self.sidecar.tensors, new, strict=True):
            refuse_spoilt(info, tensor.numpy())
        self._state = new
        found: Logits = logits.numpy()[:, -1].astype(np.float32)
        return found


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "running exported graphs needs ONNX Runtime: pip install onnxruntime"
        ) from error
    return onnxruntime
