"""Running exported graphs without torch."""

from arkv_fx.runtime.engine_session import EngineSession
from arkv_fx.runtime.manifest import Sidecar, read_sidecar
from arkv_fx.runtime.onnx_session import OnnxSession
from arkv_fx.runtime.sampling import Sampling
from arkv_fx.runtime.signing import sign
from arkv_fx.runtime.torch_program import load_program

__all__ = [
    "EngineSession",
    "OnnxSession",
    "Sampling",
    "Sidecar",
    "load_program",
    "read_sidecar",
    "sign",
]
