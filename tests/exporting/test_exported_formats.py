"""Exported formats and writes do what the reference does: every format, many steps, no export."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from arkv_fx import formats
from arkv_fx.errors import ExportError
from arkv_fx.exporting.export_plan import ExportPlan, exportable
from arkv_fx.formats.codec import Codec
from arkv_fx.formats.int3 import Int3
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.plan import LayerPlan, Tier

BATCH, HEADS, DIM = 2, 2, 16
TIERS = [
    ("k8v4", "k4v3"), ("int8", "int4"), ("native", "fp8"), ("fp8", "k8v4"), ("bf16",), ("int4",),
    ("native",),
]  # fmt: skip


def plan(tiers: tuple[str, ...], sliding: int = 0) -> LayerPlan:
    slots = tuple(Tier(name, 6) for name in tiers)
    return LayerPlan(HEADS, DIM, DIM, torch.float32, 4, 2, sliding, slots, "combined")


def state(of: LayerPlan) -> list[Tensor]:
    return [torch.full((BATCH, *s.shape), s.fill).to(s.dtype) for s in of.specs()]


def exported(tensors: list[Tensor], of: LayerPlan) -> list[Tensor]:
    """Copies with the bytes that exported graphs hold."""
    out = []
    for x, spec in zip(tensors, of.specs(), strict=True):
        if x.dtype == torch.uint8 and spec.dtype == torch.int8:
            x = (x.to(torch.int16) - 128).to(torch.int8)
        out.append(x.view(spec.dtype).clone())
    return out


def occupied(name: str, held: list[Tensor], of: LayerPlan) -> Tensor:
    """Which slots of the segment that a tensor belongs to hold a token: [B, H, C]."""
    (pos,) = (x for x, spec in zip(held, of.specs(), strict=True) if spec.name == "pos")
    ring, *tiers = pos.split([of.ring, *(tier.slots for tier in of.tiers)], -1)
    return (tiers[int(name[4])] if name.startswith("tier") else ring) >= 0


def calls(steps: int = 40) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of a prompt and of ``steps`` tokens."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps + 1):
        length = 1 if step else 12
        q = torch.randn(BATCH, 4, length, DIM, generator=generator)
        k, v = (torch.randn(BATCH, HEADS, length, DIM, generator=generator) for _ in range(2))
        yield q, k, v


@pytest.mark.parametrize("tiers", TIERS, ids="-".join)
@pytest.mark.parametrize("sliding, kernel", [(0, "export"), (20, "export"), (20, "export_sums")])
def test_exported_formats_hold_what_the_reference_holds(
    tiers: tuple[str, ...], sliding: int, kernel: str
) -> None:
    reference, knobs = plan(tiers, sliding), Knobs(DIM**-0.5)
    ours = ExportPlan.of(reference, "here")
    held, written, other = state(reference), 0, 0
    for step, (q, k, v) in enumerate(calls()):
        found = exported(held, ours)  # each step from the reference's own state
        expected = attend(q, k, v, None, held, reference, knobs, not step)
        out = attend(q, k, v, None, found, ours, knobs, not step, kernel)
        assert torch.allclose(out, expected, atol=1e-5)
        for a, b, spec in zip(found, exported(held, ours), ours.specs(), strict=True):
            assert a.dtype == b.dtype == spec.dtype
            if spec.name.endswith(("codes", "scale", "zero")) and a.dtype != torch.float32:
                # A scale may round the other way where float32 sums differ in their last bit.
                differ = (a.float() != b.float()).any(-1)
                other += int((differ & occupied(spec.name, held, reference)).sum())
                written += BATCH * HEADS * k.shape[2]
            else:
                assert torch.allclose(a.float(), b.float(), atol=1e-5), spec.name
    assert other <= 0.01 * written


def run(one: LayerPlan, kernel: str) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the state after all calls."""
    held, knobs = state(one), Knobs(DIM**-0.5)
    outs = [
        attend(q, k, v, None, held, one, knobs, not step, kernel)
        for step, (q, k, v) in enumerate(calls())
    ]
    return outs, held


@pytest.mark.parametrize("tiers", [("k8v4", "k4v3"), ("native", "fp8")], ids="-".join)
def test_writing_by_selection_is_writing_by_index(tiers: tuple[str, ...]) -> None:
    """Of any format, bit by bit."""
    expected, before = run(plan(tiers), "reference")
    found, after = run(plan(tiers), "export")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def form(name: str) -> Codec:
    """The codec in exported graphs."""
    found = formats.CODECS[name].exported()
    assert found is not None
    return found


@pytest.mark.parametrize("name", sorted(formats.CODECS))
def test_a_codec_keeps_its_bytes_and_its_error(name: str) -> None:
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(1)) * 3
    ours, theirs = form(name), formats.CODECS[name]
    assert ours.nbytes(64, torch.float32) == theirs.nbytes(64, torch.float32)
    codes = ours.encode(x)
    assert [c.dtype for c in codes] == [f.dtype for f in ours.fields(64, torch.float32)]
    decoded = ours.from_stored(ours.decode(codes, 64, torch.float32))
    far = (decoded - theirs.roundtrip(x)).abs().amax(-1) > 1e-4
    assert far.float().mean() < 0.01  # the other way of rounding, here and there
    assert (decoded - x).norm() < 1.01 * (theirs.roundtrip(x) - x).norm() + 1e-6


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int3"])
def test_vectors_at_the_ends_of_the_range(name: str, value: float) -> None:
    codec = form(name)
    x = torch.full((1, 16), value)
    decoded = codec.from_stored(codec.decode(codec.encode(x), 16, torch.float32))
    assert torch.isfinite(decoded).all()
    assert torch.allclose(decoded, x, rtol=0.1)


def test_every_format_can_be_exported() -> None:
    assert exportable() == list(formats.FORMATS)


def test_a_format_without_an_exported_form_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Int3, "exported", lambda codec: None)
    with pytest.raises(ExportError, match=r"layer 3: .*'k4v3' stores int3.*choose tiers of native"):
        ExportPlan.of(plan(("int8", "k4v3")), "layer 3")
