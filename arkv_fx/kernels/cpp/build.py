"""The C++ source as a loaded library."""

from __future__ import annotations

import re
from ctypes import CDLL
from functools import lru_cache
from pathlib import Path

from arkv_fx.errors import KernelError
from arkv_fx.kernels.cpp.arguments import FORMS

HERE = Path(__file__).parent


def traits() -> str:
    """``traits.h``: what the formats say of themselves (``CppForm``), as enumeration and tables."""
    plain = [("F32", "F32Row", 32), ("BF16", "BF16Row", 16), ("F16", "F16Row", 16)]
    names = [name for name, _, _ in plain] + [name.upper() for name in FORMS]
    rows = [row for _, row, _ in plain] + [form.row for form in FORMS.values()]
    table = [f"{{{bits}, 0, false}}" for _, _, bits in plain]
    table += [f"{{{f.bits}, {f.top}, {str(f.integers).lower()}}}" for f in FORMS.values()]
    packers = [form.pack for form in FORMS.values()]
    pack, unpack = (
        ", ".join(["nullptr"] * len(plain) + [before + p if p else "nullptr" for p in packers])
        for before in ("", "un")
    )
    by_codec = ", ".join(f"OF_ROW(f, K({row}))" for row in rows)
    return (
        f"enum Codec : int64_t {{ {', '.join(names)}, CODECS }};\n"
        "struct Traits { int bits, top; bool integers; };\n"
        f"static constexpr Traits TRAITS[CODECS] = {{{', '.join(table)}}};\n"
        f"#define PACKERS {{{pack}}}\n#define UNPACKERS {{{unpack}}}\n"
        f"#define BY_CODEC(f, K) {{{by_codec}}}\n"
    )


def source() -> str:
    """``binding.cpp`` with our headers in place of their includes: caches go by one text."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = traits() if name == "traits.h" else (HERE / name).read_text()
        return re.sub(r'#include "(.+)"', lambda m: expand(m[1]), text).replace("#pragma once", "")

    return expand("binding.cpp")


@lru_cache(maxsize=1)
def load() -> CDLL:
    """Compile (seconds, once per machine and version) or take from Inductor's cache on disk.

    Raises:
        KernelError: without a working compiler.
    """
    from torch._inductor import config  # here: it takes seconds to import
    from torch._inductor.codecache import CppCodeCache

    # Multiplications and additions in one instruction; the code holds no comparison that minds.
    with config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        try:
            library: CDLL = CppCodeCache.load(source())
        except Exception as error:
            # What the compiler said, without the command that torch puts before it.
            said = str(error).split("Output:\n")[-1].strip()[:2000]
            raise KernelError(
                f"the C++ kernel could not be compiled: {said}; install a C++ compiler "
                "(g++ 12, clang++ 13 or newer, or name one in CXX), or choose another kernel"
            ) from error
    return library


@lru_cache(maxsize=1)
def available() -> str:
    """Empty if the kernel can run here, else the reason why not. Compiles it, or fails to, once."""
    try:
        load()
    except KernelError as error:
        return str(error)
    return ""
