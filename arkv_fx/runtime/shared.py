"""ONNX Runtime's sessions, one for each file however many of ours run it: they share its weights.

Running one is safe from several threads, and it remembers nothing from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

from arkv_fx.errors import EngineError

_opened: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_lock = Lock()


def open_graph(runtime: Any, path: Path, inputs: Sequence[str], threads: int) -> Any:
    """ONNX Runtime's session for a graph with these inputs, which lives as long as it is used.

    Raises:
        EngineError: if it cannot be run, or takes something else.
    """
    folder = [(file.name, file.stat()) for file in sorted(path.parent.iterdir()) if file.is_file()]
    stamps = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in folder)
    key = (path.resolve(), stamps, threads)
    with _lock:
        session = _opened.get(key)
        if session is None:
            session = _opened[key] = _new(runtime, path, threads)
    found = sorted(value.name for value in session.get_inputs())
    if found != sorted(inputs):
        odd = sorted({*found} ^ {*inputs})
        raise EngineError(
            f"{path}: not the graph that arkv.json tells of: its inputs differ in "
            f"{', '.join(odd[:4])}; export again"
        )
    return session


def _new(runtime: Any, path: Path, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise EngineError(f"{path}: ONNX Runtime cannot run it: {error}") from error
