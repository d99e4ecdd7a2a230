"""What a storage format is: a codec turns one vector into a few small tensors and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from arkv_fx.errors import UnsupportedFormatError
from arkv_fx.runtime.operators import leaving_torch

# Scales and zero points: the range of float32 in two bytes, so no magnitude of the input
# overflows. Codecs encode with the ROUNDED value, so having only eight bits costs nothing.
SCALE_DTYPE = torch.bfloat16
# The smallest scale: a normal number in bfloat16 and float32, so dividing by it is always safe.
TINY_SCALE = torch.finfo(SCALE_DTYPE).tiny


@dataclass(frozen=True)
class Field:
    """One storage tensor of a codec, `[..., width]` with one row per token and kv head."""

    name: str
    """`codes`, `scale` or `zero`."""
    width: int
    """Elements per token and kv head."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes per token and kv head."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Unpacked:
    """Stored vectors as float32 numbers: (run * unit - zero) * scale.

    `runs` are contiguous runs of the vector, `[..., D / len(runs)]` each, and `units` one power of
    two for each: masking bits where they lie is cheaper than shifting them down, and a factor is
    free once it is taken into the query or the sum. `scale` and `zero` are `[..., 1]`, or None
    where the format has none.

    With `turns` > 1 the elements of a longer run are dealt in turn to as many runs that follow
    each other: to the first of them the first element, the one after `turns` more, and so on.
    """

    runs: list[Tensor]
    units: tuple[float, ...] = (1.0,)
    scale: Tensor | None = None
    zero: Tensor | None = None
    turns: int = 1

    def deal(self, x: Tensor) -> Tensor:
        """Vectors `[..., D]` in the order of the runs: `[..., runs, D / runs]`."""
        dealt: Tensor = x.unflatten(-1, (len(self.runs) // self.turns, -1, self.turns))
        return dealt.transpose(-1, -2).flatten(-3, -2)

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `deal`."""
        dealt: Tensor = x.unflatten(-2, (-1, self.turns))
        return dealt.transpose(-1, -2).flatten(-3)


@dataclass(frozen=True)
class CppForm:
    """What the C++ kernel is compiled with for a codec of `CODECS` whose codes it reads and makes.

    Its fields are codes, a scale and, for codes of less than a byte, a zero.
    """

    row: str
    """Type of `codecs.h` that reads codes, unpacked to bytes, as floats."""
    top: int
    """The largest code."""
    bits: int = 8
    """Of one code; below 8, codes are packed and stand for a rotated vector."""
    pack: str = ""
    """Function of `vectors.h` that packs bytes, `name(codes, D, to)`, and, with `un` before it, one
    of `codecs.h` that unpacks them, `name(codes, rows, D, to, stride)`."""
    integers: bool = True
    """Whether codes are integers, which half-precision models multiply as such."""


@dataclass(frozen=True)
class Codec(ABC):
    """How one vector (the key or the value of one token and kv head) is stored.

    Codecs hold no state, so two of one class are equal, also after pickling. All arithmetic is in
    float32, and nothing depends on the data but the data: everything traces and exports.

    `fields`, `encode` and `unpack` are the reference, from which Inductor makes code; all else is
    optional. A kernel whose form of a codec is missing leaves its layers to the next one. Forms are
    not inherited: a subclass may store other bytes.
    """

    name: ClassVar[str]
    multiple: ClassVar[int] = 1
    """Vector lengths must be a multiple of this."""
    centred: ClassVar[bool] = False
    """Whether keys are stored as their difference to the head's centre, see `plan.LayerPlan`."""
    plain: ClassVar[bool] = False
    """Whether its one field is the vector's own numbers, at most cast: the ring may hold them."""
    cpp: ClassVar[CppForm | None] = None
    """The C++ kernel's form; plain numbers need none."""
    triton: ClassVar[str] = ""
    """The Triton kernel's form: the name in `kernels/gpu/tiles.py` under which it is read."""
    packing: ClassVar[str] = ""
    """For readers of `arkv.json`: how the exported fields become numbers."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("plain", "cpp", "triton", "packing", "exported", "split_words"):
            if name not in vars(cls):
                setattr(cls, name, vars(Codec)[name])

    def exported(self) -> Codec | None:
        """The codec that graphs outside of torch compute with: the same numbers, other arithmetic.

        None where there can be none. ONNX cannot select unsigned bytes: they are held as int8, less
        128.
        """
        held = self.fields(self.multiple, torch.float32)
        return ByteCodec(self) if any(f.dtype == torch.uint8 for f in held) else self

    def check(self, dim: int) -> None:
        """Raise `UnsupportedFormatError` unless vectors of `dim` elements can be stored."""
        if dim < 1 or dim % self.multiple:
            raise UnsupportedFormatError(
                f"{self.name} cannot store vectors of {dim} elements: "
                f"the head dimension must be a positive multiple of {self.multiple}"
            )

    @abstractmethod
    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        """The tensors that store vectors of `dim` elements of a model in dtype `native`."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Store `x` `[..., D]` (any float dtype): one tensor `[..., width]` for each field."""

    @abstractmethod
    def unpack(self, parts: Sequence[Tensor]) -> Unpacked:
        """What `encode` gave as numbers: the kernels' form of `decode`, without its products."""

    def split_words(self, words: Tensor) -> tuple[list[Tensor], tuple[float, ...]] | None:
        """Runs and units of codes read four bytes at a time, int32 `[..., bytes / 4]`.

        Byte after byte belongs to the next of four runs. None for a codec that has no such form.
        """
        return None

    def unpack_words(self, parts: Sequence[Tensor]) -> Unpacked:
        """`unpack` with codes read four bytes at a time, where the codec and their number allow.

        For compilers that widen each byte on its own: with AVX2 Inductor does so through memory.
        Fewer bytes than a vector register holds (64 with AVX-512) are faster one by one.
        """
        found, codes = self.unpack(parts), parts[0]
        if codes.dtype.itemsize > 1 or codes.shape[-1] < 64 or codes.shape[-1] % 4:
            return found
        split = self.split_words(codes.view(torch.int32))
        return found if split is None else replace(found, runs=split[0], units=split[1], turns=4)

    def decode(self, parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        """The vectors `[..., dim]` in `dtype` from what `encode` gave, in the STORED basis.

        The rotation is left in, because attention need not undo it for every slot: it rotates the
        query once (an orthogonal map keeps q.k) and the sum over the values once.
        """
        found = self.unpack(parts)
        runs = [run * unit for run, unit in zip(found.runs, found.units, strict=True)]
        codes = torch.cat(runs, -1) if len(runs) > 1 else runs[0]
        if found.zero is not None:
            codes = codes - found.zero
        if found.scale is not None:
            codes = codes * found.scale
        return codes.to(dtype)

    def to_stored(self, x: Tensor) -> Tensor:
        """`x` `[..., D]` in the basis of the stored vectors; same dtype, orthogonal: keeps q.k."""
        return x

    def from_stored(self, x: Tensor) -> Tensor:
        """The inverse of `to_stored`, for `[..., D]`."""
        return x

    def roundtrip(self, x: Tensor) -> Tensor:
        """What `x` `[..., D]` becomes when it is stored and read back, in its own dtype."""
        stored = self.decode(self.encode(x), x.shape[-1], torch.float32)
        return self.from_stored(stored).to(x.dtype)

    def nbytes(self, dim: int, native: torch.dtype) -> int:
        """Exact bytes per token and kv head, scales included."""
        return sum(field.nbytes for field in self.fields(dim, native))


def top_bytes(words: Tensor) -> list[Tensor]:
    """The four bytes of int32 words, lowest first, each moved to the top of an int32."""
    top = -0x1000000
    return [words << 24, words << 16 & top, words << 8 & top, words & top]


def round_to_scale_dtype(x: Tensor) -> Tensor:
    """`x` (float32) rounded to what `SCALE_DTYPE` can hold, still in float32.

    On the bits, because Inductor computes bfloat16 in float32 and drops the rounding of a cast
    there and back: the codes would be made with another scale than the one that is stored.
    """
    if leaving_torch():  # no bits of float32 there, but real casts
        return x.to(SCALE_DTYPE).to(torch.float32)
    return ((x.view(torch.int32) + 0x8000) & ~0xFFFF).view(torch.float32)


def stored_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """In exported graphs: a scale as it is stored, and the float32 number that this is."""
    stored = x.clamp_min(TINY_SCALE).to(SCALE_DTYPE)
    return stored, stored.to(torch.float32)


def symmetric_scale(x: Tensor, top: float) -> Tensor:
    """The scale `[..., 1]` that maps the largest magnitude of `x` `[..., D]` to `top`.

    float32 in and out, rounded to `SCALE_DTYPE`.
    """
    return round_to_scale_dtype((x.abs().amax(-1, keepdim=True) / top).clamp_min(TINY_SCALE))


BYTE_SHIFT = 128  # an unsigned byte less this is an int8


@dataclass(frozen=True)
class WrappedCodec(Codec):
    """A codec whose fields lie otherwise in exported graphs; all else is as it was.

    A subclass says how in ``fields`` and ``encode``, and makes the codec's own of them in
    ``opened``.
    """

    codec: Codec

    @property
    def name(self) -> str:  # type: ignore[override]
        """The codec's."""
        return self.codec.name

    @property
    def centred(self) -> bool:  # type: ignore[override]
        """The codec's."""
        return self.codec.centred

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """The codec's."""
        return self.codec.multiple

    @abstractmethod
    def opened(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The fields as the codec itself has them."""

    def check(self, dim: int) -> None:
        self.codec.check(dim)

    def unpack(self, parts: Sequence[Tensor]) -> Unpacked:
        return self.codec.unpack(self.opened(parts))

    def decode(self, parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        return self.codec.decode(self.opened(parts), dim, dtype)

    def to_stored(self, x: Tensor) -> Tensor:
        return self.codec.to_stored(x)

    def from_stored(self, x: Tensor) -> Tensor:
        return self.codec.from_stored(x)


@dataclass(frozen=True)
class ByteCodec(WrappedCodec):
    """A codec in exported graphs, its unsigned bytes as int8, 128 less."""

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        return signed(self.codec.fields(dim, native))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            (p.to(torch.int32) - BYTE_SHIFT).to(torch.int8) if p.dtype == torch.uint8 else p
            for p in self.codec.encode(x)
        )

    def opened(self, parts: Sequence[Tensor]) -> list[Tensor]:
        held = self.codec.fields(self.codec.multiple, torch.float32)
        return [
            (p.to(torch.int32) + BYTE_SHIFT).to(torch.uint8) if f.dtype == torch.uint8 else p
            for p, f in zip(parts, held, strict=True)
        ]


def signed(fields: Sequence[Field]) -> tuple[Field, ...]:
    """Fields as exported graphs hold them: bytes in int8."""
    return tuple(replace(f, dtype=torch.int8) if f.dtype == torch.uint8 else f for f in fields)
