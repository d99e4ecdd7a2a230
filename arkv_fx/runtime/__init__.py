"""Running exported graphs without torch."""

from arkv_fx.runtime.sampling import Sampling
from arkv_fx.runtime.session import OnnxSession
from arkv_fx.runtime.sidecar import Sidecar, read_sidecar

__all__ = ["OnnxSession", "Sampling", "Sidecar", "read_sidecar"]
