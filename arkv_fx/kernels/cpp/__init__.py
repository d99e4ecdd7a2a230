"""Decoding on a CPU in C++: codes are read as they are stored and never written out.

Three operators, which Inductor takes as external calls: ``arkv_cpu::attend`` is the attention of
one token, ``arkv_cpu::step`` the whole decode step, ``arkv_cpu::encode`` makes the codes of a
prompt's tokens. ``direct`` calls the step without its operator. All are compiled at first use, see
``build``.
"""

import torch

from arkv_fx.kernels.cpp.arguments import lacks
from arkv_fx.kernels.cpp.attend_operator import attend_cpp
from arkv_fx.kernels.cpp.build import available
from arkv_fx.kernels.cpp.direct import make_direct_step
from arkv_fx.kernels.cpp.encode_operator import encode_cpp
from arkv_fx.kernels.cpp.step_operator import make_step
from arkv_fx.kernels.kernel import Kernel, WholeStep

__all__ = ["KERNEL", "attend_cpp", "available", "encode_cpp", "make_direct_step", "make_step"]


def _obstacle(device: torch.device) -> str:
    return available() if device.type == "cpu" else "it runs on CPUs"


KERNEL = Kernel(
    "cpp",
    attend_cpp,
    priority=20,
    obstacle=_obstacle,
    lacks=lacks,
    encode=encode_cpp,
    step=WholeStep(make_step, make_direct_step),
)
