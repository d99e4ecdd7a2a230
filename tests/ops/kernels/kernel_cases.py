"""Layers that hold real tokens, for kernels to be compared with the reference on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from reference_attention import Layer, make_mask
from torch import Tensor

from arkv_fx.ops.attention import Knobs
from arkv_fx.ops.kernels import get_kernel
from arkv_fx.plan import LayerPlan, Tier

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
MASKS = ("none", "bool", "additive", "lowest", "bool-heads", "additive-heads")


@dataclass(frozen=True)
class Case:
    """A layer that holds ``length`` tokens; ``pad`` are left padding tokens per row."""

    length: int = 60
    pad: tuple[int, ...] = (0,)
    heads: int = 2
    groups: int = 2
    k_dim: int = 16
    v_dim: int = 16
    tiers: tuple[tuple[str, int], ...] = (("k8v4", 20), ("k4v3", 90))
    window_format: str = "native"
    sliding: int = 0
    dtype: torch.dtype = torch.float32
    mask: str = "none"
    softcap: float = 0.0
    sink_logits: bool = False
    threads: int = 1
    seed: int = 0


def arguments(case: Case, score: str = "combined") -> tuple[Layer, dict[str, Any]]:
    """A filled layer and what a kernel takes for the token after it."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(heads: int, length: int, dim: int) -> Tensor:
        x = torch.randn(len(case.pad), heads, length, dim, generator=generator)
        return (x + torch.arange(dim) % 3).to(case.dtype)  # a common part, as keys have

    plan = LayerPlan(
        case.heads, case.k_dim, case.v_dim, case.dtype, 5, 0 if case.sliding else 2, case.sliding,
        tuple(Tier(*t) for t in case.tiers), score, (), case.window_format,
    )  # fmt: skip
    layer = Layer(plan, len(case.pad))
    query_heads = case.heads * case.groups
    sink = torch.randn(query_heads, generator=generator) if case.sink_logits else None
    knobs = Knobs(0.5 / case.k_dim**0.5, case.softcap, sink)
    total = case.length + 1
    valid = torch.arange(total)[None] >= torch.tensor(case.pad)[:, None]
    first = make_mask(valid[:, :-1], case.length, kind="bool")
    layer.step(
        normal(query_heads, case.length, case.k_dim), normal(case.heads, case.length, case.k_dim),
        normal(case.heads, case.length, case.v_dim), first, knobs, valid[:, :-1], fresh=True,
    )  # fmt: skip
    mask = make_mask(
        valid, 1, kind=case.mask, heads=query_heads, sliding=case.sliding, dtype=case.dtype,
        generator=generator,
    )  # fmt: skip
    held = layer.state.view()
    return layer, {
        "q": normal(query_heads, 1, case.k_dim).unflatten(1, (case.heads, case.groups)),
        "k": normal(case.heads, 1, case.k_dim),
        "v": normal(case.heads, 1, case.v_dim),
        "mask": mask,
        "held": held,
        "knobs": knobs,
        "query_pos": held.seen[:, None],
    }


def compare(kernel: str, args: dict[str, Any], dtype: torch.dtype, **changed: Any) -> None:
    """Output and probabilities agree with the reference's, hidden columns exactly."""
    expected = get_kernel("reference")(**args)
    found = get_kernel(kernel)(**{**args, **changed})
    for name, x, y in zip(("output", "probabilities"), expected, found, strict=True):
        assert x.shape == y.shape and y.dtype == torch.float32
        assert (y[x == 0] == 0).all(), f"{name}: something hidden is seen"
        error = float((x - y).abs().max() / x.abs().max().clamp(min=1e-3))
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tiers = draw(
        st.sampled_from(
            (
                (("native", 70),),
                (("bf16", 8), ("fp8", 70)),
                (("int8", 70),),
                (("int8", 5), ("int4", 130)),
                (("k8v4", 20), ("k4v3", 90)),
                (("k4v3", 0), ("k4v3", 40)),
            )
        )
    )
    names = {name for name, _ in tiers}
    step = 8 if "k4v3" in names or "k8v4" in names else 2 if "int4" in names else 1
    dims = st.one_of(
        st.integers(1, 80 // step).map(lambda n: n * step), st.sampled_from((64, 128, 256))
    )
    length = draw(st.integers(1, 140))
    pad = draw(st.lists(st.integers(0, length + 1), min_size=1, max_size=3).map(tuple))
    return Case(
        length=length,
        pad=pad,
        heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 9)),
        k_dim=draw(dims),
        v_dim=draw(dims),
        tiers=tiers,
        window_format=draw(st.sampled_from(("native", "bf16"))),
        sliding=draw(st.sampled_from((0, 0, 9, 60))),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16))),
        mask=draw(st.sampled_from(MASKS if not any(pad) else MASKS[1:])),
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0))),
        sink_logits=draw(st.booleans()),
        threads=draw(st.sampled_from((1, 2))),
        seed=draw(st.integers(0, 999)),
    )
