"""Layers that hold real tokens, for kernels to be compared with the reference on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from reference_attention import MASKS, TOLERANCE, Layer, make_mask
from torch import Tensor

from arkv_fx.kernels import get_kernel
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.plan import LayerPlan, Tier


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
    balanced: bool = False  # then channels of keys are of unlike size
    short: bool = False  # positions in int16

    def plan(
        self, score: str = "combined", options: tuple[tuple[str, float], ...] = ()
    ) -> LayerPlan:
        return LayerPlan(
            self.heads, self.k_dim, self.v_dim, self.dtype, 5, 0 if self.sliding else 2,
            self.sliding, tuple(Tier(*t) for t in self.tiers), score, options, self.window_format,
            self.balanced, self.short,
        )  # fmt: skip

    def normal(self, generator: torch.Generator, heads: int, length: int, dim: int) -> Tensor:
        x = torch.randn(len(self.pad), heads, length, dim, generator=generator)
        return (x + torch.arange(dim) % 3).to(self.dtype)  # a common part, as keys have

    def inputs(self, generator: torch.Generator, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of so many tokens."""
        q, k, v = (
            self.normal(generator, heads, length, dim)
            for heads, dim in (
                (self.heads * self.groups, self.k_dim), (self.heads, self.k_dim),
                (self.heads, self.v_dim),
            )
        )  # fmt: skip
        if self.balanced:
            k = k * 4.0 ** (torch.arange(self.k_dim) % 3 - 1).to(self.dtype)
        return q, k, v

    def knobs(self, generator: torch.Generator) -> Knobs:
        query_heads = self.heads * self.groups
        sink = torch.randn(query_heads, generator=generator) if self.sink_logits else None
        return Knobs(0.5 / self.k_dim**0.5, self.softcap, sink)

    def new_mask(self, valid: Tensor, generator: torch.Generator) -> Tensor | None:
        """The mask of the newest token; ``valid`` [B, S] of all so far."""
        return make_mask(
            valid, 1, kind=self.mask, heads=self.heads * self.groups, sliding=self.sliding,
            dtype=self.dtype, generator=generator,
        )  # fmt: skip


def arguments(case: Case, score: str = "combined") -> tuple[Layer, dict[str, Any]]:
    """A filled layer and what a kernel takes for the token after it."""
    generator = torch.Generator().manual_seed(case.seed)
    layer = Layer(case.plan(score), len(case.pad))
    knobs = case.knobs(generator)
    valid = torch.arange(case.length + 1)[None] >= torch.tensor(case.pad)[:, None]
    first = make_mask(valid[:, :-1], case.length, kind="bool")
    layer.step(*case.inputs(generator, case.length), first, knobs, valid[:, :-1], fresh=True)
    mask = case.new_mask(valid, generator)
    held = layer.state.view()
    q, k, v = case.inputs(generator, 1)
    return layer, {
        "q": q.unflatten(1, (case.heads, case.groups)),
        "k": k,
        "v": v,
        "mask": mask,
        "held": held,
        "knobs": knobs,
        "query_pos": held.seen[:, None],
    }


def recorded(operator: object, call: Callable[[], object]) -> tuple[object, ...]:
    """The arguments that ``operator`` gets in ``call``."""
    found: list[tuple[object, ...]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is operator:
                found.append(args)
            return func(*args, **(kwargs or {}))

    with Record():
        call()
    return found[0]


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
        short=draw(st.booleans()),
    )
