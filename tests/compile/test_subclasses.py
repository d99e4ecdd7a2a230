"""Weights that are tensors of a class of their own, as quantized ones are, compile in pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import arkv_fx
from arkv_fx.compile.weight_guards import tensor_form
from arkv_fx.models import random_model

CONFIG = arkv_fx.ArkvConfig(budget=64, window=8, tiers=("native",))


class Scaled(Tensor):
    """Int8 codes times one scale."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, codes.shape, strides=codes.stride(), dtype=scale.dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: Any, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Scaled(func(args[0].codes), func(args[0].scale))
        plain = tree_map(
            lambda x: x.codes.to(x.scale.dtype) * x.scale if isinstance(x, Scaled) else x,
            (args, kwargs or {}),
        )
        return func(*plain[0], **plain[1])


def model(compile: str) -> Any:
    made: Any = random_model("llama")
    for layer in made.model.layers:
        linear = layer.mlp.up_proj
        scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        linear.weight = nn.Parameter(Scaled(codes, scale), requires_grad=False)
    return arkv_fx.transform(made, CONFIG, compile=compile)


@torch.no_grad()
def test_they_compile_to_what_eager_gives() -> None:
    ids = torch.randint(1, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for compile in ("eager", "inductor"):
        first = model(compile)
        out = first(ids)
        step = first(ids[:, :1], past_key_values=out.past_key_values)
        found.append(torch.cat([out.logits, step.logits], 1))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_codes_of_other_types_are_other_pieces() -> None:
    scale = torch.ones(())
    forms = [
        tensor_form(Scaled(torch.zeros(4, 4, dtype=d), scale)) for d in (torch.int8, torch.int16)
    ]
    assert forms[0] != forms[1] and forms[0] != tensor_form(torch.zeros(4, 4))
