"""Decoding on a CPU in C++: codes are read as they are stored and never written out.

Two operators, which Inductor takes as external calls: ``arkv_cpu::attend`` is the attention of one
token, ``arkv_cpu::step`` the whole decode step. Both are compiled at first use, see ``build``.
"""

from arkv_fx.ops.kernels.cpp.attend import attend_cpp
from arkv_fx.ops.kernels.cpp.build import available
from arkv_fx.ops.kernels.cpp.step import knows, step_cpp

__all__ = ["attend_cpp", "available", "knows", "step_cpp"]
