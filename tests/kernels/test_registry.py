"""Which kernel is taken where."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from arkv_fx.errors import UnknownOptionError
from arkv_fx.formats import CODECS, FORMATS, Format
from arkv_fx.formats.native import Native
from arkv_fx.kernels import KERNELS, get_direct_step, get_kernel, get_step, usable
from arkv_fx.kernels.cpp import available
from arkv_fx.plan import LayerPlan, Tier

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Own(Native):
    """A user's codec."""

    name: ClassVar[str] = "own"


def plan(format: str, score: str = "combined") -> LayerPlan:
    return LayerPlan(2, 16, 16, torch.float32, 4, 1, 0, (Tier(format, 8),), score)


@pytest.mark.skipif(bool(available()), reason="no C++ compiler")
def test_the_fastest_kernel_that_knows_the_formats_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FORMATS, "own", Format("own", Own(), Own()))
    for name in set(FORMATS) - {"own"}:
        assert usable(CPU, plan(name))[0] == "cpp"
        assert get_step("cpp", plan(name)) and get_direct_step("cpp", plan(name))
    assert usable(CPU, plan("own"))[0] == "inductor"
    assert usable(CUDA, plan("own"))[0] == "inductor"
    for unknown in (plan("own"), plan("int8", score="paper")):
        assert get_step("cpp", unknown) is None and get_direct_step("cpp", unknown) is None


def test_every_codec_has_its_triton_form() -> None:
    assert all(codec.triton == name for name, codec in CODECS.items())


def test_names_are_those_of_the_registry() -> None:
    assert {*usable(CPU), *usable(CUDA)} <= set(KERNELS)
    with pytest.raises(UnknownOptionError, match="unknown kernel 'fastest'; the kernels are"):
        get_kernel("fastest")
