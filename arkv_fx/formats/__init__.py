"""Storage formats: a codec for keys and a codec for values, by name.

To add one: a `Codec` in a file of its own and `FORMATS.add(Format("its name", codec, codec))`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from arkv_fx.errors import UnsupportedFormatError
from arkv_fx.formats.bf16 import Bf16
from arkv_fx.formats.codec import Codec, CppForm, Field, Unpacked
from arkv_fx.formats.fp8 import Fp8
from arkv_fx.formats.int3 import Int3
from arkv_fx.formats.int4 import Int4
from arkv_fx.formats.int8 import Int8
from arkv_fx.formats.native import Native
from arkv_fx.registry import Registry

__all__ = ["CODECS", "FORMATS", "Codec", "CppForm", "Field", "Format", "Unpacked", "get_format"]

CODECS: Registry[Codec] = Registry("codec", (Native(), Bf16(), Fp8(), Int8(), Int4(), Int3()))


@dataclass(frozen=True)
class Format:
    """How a tier stores a token: keys need the bits more than values, so each has its codec."""

    name: str
    key: Codec
    value: Codec

    def nbytes(self, k_dim: int, v_dim: int, native: torch.dtype) -> int:
        """Exact bytes per token and kv head, key and value, scales included."""
        return self.key.nbytes(k_dim, native) + self.value.nbytes(v_dim, native)

    def check(self, k_dim: int, v_dim: int) -> None:
        """Raise `UnsupportedFormatError` unless heads of these dimensions can be stored."""
        for part, codec, dim in (("keys", self.key, k_dim), ("values", self.value, v_dim)):
            try:
                codec.check(dim)
            except UnsupportedFormatError as error:
                raise UnsupportedFormatError(f"format {self.name!r}, {part}: {error}") from None

    def exported(self) -> Format:
        """The format in graphs that leave torch; raises `UnsupportedFormatError` without one."""
        key, value = self.key.exported(), self.value.exported()
        if key is None or value is None:
            missing = sorted({c.name for c in self.codecs if c.exported() is None})
            raise UnsupportedFormatError(
                f"format {self.name!r} stores {', '.join(missing)}, which cannot be exported"
            )
        return Format(self.name, key, value)

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """Of keys and of values."""
        return self.key, self.value


FORMATS: Registry[Format] = Registry(
    "format",
    (
        Format(name, CODECS[key], CODECS[value])
        for name, key, value in (
            ("native", "native", "native"),
            ("bf16", "bf16", "bf16"),
            ("fp8", "fp8", "fp8"),
            ("int8", "int8", "int8"),
            ("k8v4", "int8", "int4"),
            ("int4", "int4", "int4"),
            ("k4v3", "int4", "int3"),
        )
    ),
)

get_format = FORMATS.find
