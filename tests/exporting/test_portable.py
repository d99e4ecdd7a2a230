"""bfloat16 and float8 as their bytes: the same memory in torch, and by arithmetic in ONNX."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from test_exported_formats import TIERS, calls, occupied, plan, state
from torch import Tensor, nn

from arkv_fx.exporting.export_plan import ExportPlan, PortablePlan
from arkv_fx.exporting.groups import group_layers
from arkv_fx.exporting.translations import PORTABLE
from arkv_fx.formats.portable import STRANGE
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.runtime.operators import from_bytes, to_bytes


def every(dtype: torch.dtype, width: int) -> Tensor:
    """Every finite number of a dtype that is none of bfloat16's below 2^-125, [N, width]."""
    bits = torch.arange(2 ** (8 * dtype.itemsize))
    held = bits.to(torch.int16 if dtype == torch.bfloat16 else torch.uint8)
    x = held.view(dtype)
    fits = x.float().isfinite() & ((x.float().abs() >= 2.0**-125) | (bits == 0))
    if dtype != torch.bfloat16:
        fits = x.float().isfinite() & (bits != 128)  # not -0
    x = x.float()[fits].to(dtype)
    return x[: len(x) // width * width].view(-1, width)


class There(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        held = to_bytes(x.to(self.dtype))
        return held, from_bytes(held, self.dtype)


def in_onnx(module: nn.Module, x: Tensor) -> list[np.ndarray[Any, Any]]:
    program = torch.onnx.export(
        module, (x,), dynamo=True, opset_version=21, optimize=False, verbose=False,
        custom_translation_table=PORTABLE,
    )  # fmt: skip
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    found: list[np.ndarray[Any, Any]] = session.run(None, {"x": x.numpy()})
    return found


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("dtype", STRANGE, ids=str)
def test_every_number_has_its_bytes_and_comes_back(dtype: torch.dtype, width: int) -> None:
    x = every(dtype, width)
    held, back = in_onnx(There(dtype), x.float())
    assert (held == x.view(torch.int8).numpy()).all()
    assert (back == x.float().numpy()).all()
    assert len(x) * width > (60_000 if dtype == torch.bfloat16 else 249)


def test_what_is_no_number_ends_no_run() -> None:
    x = torch.tensor([[float("nan")], [float("inf")], [float("-inf")]])
    held, _ = in_onnx(There(torch.bfloat16), x)
    assert held.shape == (3, 2)


def test_a_plan_holds_as_many_bytes() -> None:
    for tiers in TIERS:
        ours = PortablePlan.of(plan(tiers), "here")
        assert ours.nbytes(3) == plan(tiers).nbytes(3)
        assert not {s.dtype for s in ours.specs()} & set(STRANGE)


def memory(tensors: list[Tensor], of: ExportPlan) -> list[Tensor]:
    """Copies of the reference's state as portable graphs hold it."""
    out = []
    for x, spec in zip(tensors, of.specs(), strict=True):
        shifted = x.dtype == torch.uint8 and spec.name not in of.bytes_of
        x = (x.to(torch.int16) - 128).to(torch.int8) if shifted else x
        out.append(x.view(spec.dtype).clone())
    return out


@pytest.mark.parametrize("tiers", TIERS, ids="-".join)
def test_portable_formats_hold_what_the_reference_holds(tiers: tuple[str, ...]) -> None:
    reference, knobs = plan(tiers), Knobs(16**-0.5)
    ours = PortablePlan.of(reference, "here")
    held, written, other = state(reference), 0, 0
    for step, (q, k, v) in enumerate(calls()):
        found = memory(held, ours)
        expected = attend(q, k, v, None, held, reference, knobs, not step)
        out = attend(q, k, v, None, found, ours, knobs, not step, "export")
        assert torch.allclose(out, expected, atol=1e-5)
        for a, b, spec in zip(found, memory(held, ours), ours.specs(), strict=True):
            assert a.shape == b.shape == (2, *spec.shape)
            if spec.name == "pos":
                assert torch.equal(a, b)
            elif spec.name == "novelty":  # one unit where a score lies between two
                assert int((a.short() - b.short()).abs().max()) <= 1
            elif spec.dtype == torch.int8:
                other += int(((a != b).any(-1) & occupied(spec.name, held, reference)).sum())
                written += 2 * 2 * k.shape[2]
    assert other <= 0.01 * written  # rounded the other way, here and there


def test_statistics_in_bfloat16_cross_as_bytes() -> None:
    options = (("value_norm", 1.0),)
    layer = LayerPlan(2, 16, 16, torch.float32, 4, 2, 0, (Tier("int8", 6),), "mass", options)
    assert torch.bfloat16 in {s.dtype for s in layer.specs()}, "negative control"
    (group,) = group_layers([PortablePlan.of(layer, "here")], 3)
    tensors = group.empty()
    assert not {x.dtype for x in tensors} & set(STRANGE)
    place = [s.name for s in group.plan.specs()].index("norm")
    norms = torch.randn(*tensors[place].shape[:-1], 12).to(torch.bfloat16)
    tensors[place] = norms.view(torch.int8)
    opened = group.opened(tensors)
    assert opened[place].dtype == torch.float32 and opened[place].shape == (3, 2, 12)
    assert all(torch.equal(a, b) for a, b in zip(group.closed(opened), tensors, strict=True))
