"""A format in one file: plain torch, written here, and everything takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import arkv_fx
from arkv_fx.errors import ConfigError, ExportError, UnknownOptionError
from arkv_fx.formats import CODECS, FORMATS, Codec, Field, Format, Unpacked
from arkv_fx.formats.codec import SCALE_DTYPE, symmetric_scale
from arkv_fx.formats.int4 import Int4
from arkv_fx.formats.int8 import Int8
from arkv_fx.formats.native import Native
from arkv_fx.kernels import KERNELS, usable
from arkv_fx.kernels.cpp import available
from arkv_fx.kernels.cpp.arguments import number
from arkv_fx.models import random_model
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.runtime import OnnxSession


class Int6(Codec):
    """Codes -31..31, 32 added, of a quarter of the vector each in bits 0, 6, 12, 18 of 3 bytes."""

    name: ClassVar[str] = "int6"
    multiple: ClassVar[int] = 4

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        self.check(dim)
        return Field("codes", dim // 4 * 3, torch.uint8), Field("scale", 1, SCALE_DTYPE)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(torch.float32)
        scale = symmetric_scale(x, 31.0)
        codes = (x / scale).round().clamp(-31, 31).to(torch.int32) + 32
        a, b, c, d = codes.chunk(4, -1)
        word = a | b << 6 | c << 12 | d << 18
        planes = torch.cat([word & 255, word >> 8 & 255, word >> 16], -1)
        return planes.to(torch.uint8), scale.to(SCALE_DTYPE)

    def unpack(self, parts: Sequence[Tensor]) -> Unpacked:
        low, middle, high = parts[0].to(torch.int32).chunk(3, -1)
        word = low | middle << 8 | high << 16
        runs = [((word >> bit & 63) - 32).to(torch.float32) for bit in (0, 6, 12, 18)]
        return Unpacked(runs, (1.0,) * 4, parts[1].to(torch.float32))


CONFIG = {"budget": 40, "window": 8, "sinks": 2, "tiers": ("int6",)}
PROMPT, NEW = 60, 12


@pytest.fixture(autouse=True)
def int6() -> Iterator[None]:
    FORMATS.add(Format("int6", Int6(), Int6()))
    yield
    del FORMATS["int6"]


def ids() -> Tensor:
    return torch.randint(1, 128, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def generate(compile: str, **changes: object) -> tuple[list[int], str]:
    """New tokens and the report."""
    model = random_model("llama")
    config = arkv_fx.ArkvConfig.make({**CONFIG, **changes})
    arkv_fx.transform(model, config, compile=compile)
    out = model.generate(ids(), max_new_tokens=NEW, do_sample=False)
    return out[0, PROMPT:].tolist(), str(model.arkv.report())


def test_it_stores_numbers_as_finely_as_its_bits_allow() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    error = {n: (c.roundtrip(x) - x).norm() for n, c in CODECS.items()}
    assert error["int8"] < (Int6().roundtrip(x) - x).norm() < error["int4"]
    assert Int6().nbytes(64, torch.float32) == 48 + 2


def test_it_generates_under_both_lowerings_and_the_report_names_the_kernel() -> None:
    expected, said = generate("reference")
    assert "no form" not in said
    for lowering, kernel in ("eager", "reference"), ("inductor", "inductor"):
        tokens, said = generate(lowering)
        assert tokens == expected
        assert "30 int6" in said
        if not available():
            assert f"no form of int6: layers that store it decode with kernel {kernel!r}" in said
            assert "no form" not in generate(lowering, tiers=("int8",))[1]
    assert generate("reference", tiers=("int4",))[0] != expected  # these tokens tell formats apart


def test_it_is_exported_run_and_described(tmp_path: Path) -> None:
    model = random_model("llama")
    config = arkv_fx.ArkvConfig.make(CONFIG)
    folder = arkv_fx.export(model, None, tmp_path / "out", config=config)
    said = json.loads((folder / "arkv.json").read_text())
    assert "bits 0, 6, 12, 18" in said["packing"]["int6"]
    assert said["packing"]["int6"].endswith("; uint8 fields are held as int8, 128 less")
    tokens = OnnxSession(folder).generate(ids().numpy(), NEW)
    assert tokens[0].tolist() == generate("eager")[0]


def test_tensorrt_refuses_it_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    config = arkv_fx.ArkvConfig.make(CONFIG)
    with pytest.raises(ExportError, match="'int6' stores int6, whose bytes TensorRT cannot"):
        arkv_fx.export(random_model("llama"), None, tmp_path / "out", "tensorrt", config=config)


def test_the_default_export_describes_all_that_it_holds(tmp_path: Path) -> None:
    config = arkv_fx.ArkvConfig(budget=40, window=8)
    folder = arkv_fx.export(random_model("llama"), None, tmp_path / "out", config=config)
    said = json.loads((folder / "arkv.json").read_text())["packing"]
    assert set(said) == {"int3", "int4", "int8", "native"}
    assert all(CODECS[name].packing == text for name, text in said.items())


class Coarser(Int4):
    """Other codes in the same bytes: no kernel may take its forms from its parent."""

    name: ClassVar[str] = "coarser"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().encode(x.round())


def test_forms_are_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "coarser", Format("coarser", Coarser(), Coarser()))
    plan = LayerPlan(2, 16, 16, torch.float32, 4, 1, 0, (Tier("coarser", 8),), "mass")
    for device in ("cpu", "cuda"):
        assert usable(torch.device(device), plan)[0] == "inductor"
    assert Coarser.packing == "" and type(Coarser().exported()) is not type(Int4().exported())


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ConfigError, match="another format called 'int8'"):
        FORMATS.add(Format("int8", Int6(), Int6()))
    FORMATS.add(FORMATS["int8"])  # the same thing again is no other
    with pytest.raises(UnknownOptionError, match=r"unknown format 'int5'; .*int6"):
        FORMATS.find("int5")


class Halves(Int8):
    """Codes of half the size; its parent's way of reading four bytes at once would be wrong."""

    name: ClassVar[str] = "halves"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, scale = super().encode(x)
        return (codes / 2).round().to(torch.int8), scale

    def unpack(self, parts: Sequence[Tensor]) -> Unpacked:
        found = super().unpack(parts)
        return Unpacked([found.runs[0] * 2], scale=found.scale)


def test_nor_is_the_reading_of_words() -> None:
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    parts = Halves().encode(x)
    by_word = Halves().unpack_words(parts)
    assert by_word.turns == 1 and torch.equal(by_word.runs[0], Halves().unpack(parts).runs[0])
    assert CODECS["int8"].unpack_words(CODECS["int8"].encode(x)).turns == 4


class Twice(Native):
    """Numbers, but two fields: no kernel may take it for plain ones."""

    name: ClassVar[str] = "twice"
    plain: ClassVar[bool] = True

    def fields(self, dim: int, native: torch.dtype) -> tuple[Field, ...]:
        return Field("codes", dim, native), Field("again", dim, native)


def test_what_is_plain_is_looked_at() -> None:
    assert number(CODECS["native"], torch.bfloat16) == 1
    assert number(Twice(), torch.float32) is None


def test_another_format_under_a_name_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "mine", Format("mine", Int6(), Int6()))
    text = LayerPlan(2, 16, 16, torch.float32, 4, 1, 0, (Tier("mine", 8),), "mass").to_json()
    before = LayerPlan.parse(text).nbytes()
    monkeypatch.setitem(FORMATS, "mine", Format("mine", CODECS["native"], CODECS["native"]))
    assert LayerPlan.parse(text).nbytes() > before


def test_a_kernel_must_know_the_form_that_a_codec_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int6, "triton", "int6")
    plan = LayerPlan(2, 16, 16, torch.float32, 4, 1, 0, (Tier("int6", 8),), "mass")
    assert KERNELS["triton"].lacks(plan) == ["int6"]
