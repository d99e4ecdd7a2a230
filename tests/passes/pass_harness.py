"""Small functions over a marker, captured and rewritten: what the tests of passes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from arkv_fx.passes import pipeline
from arkv_fx.passes.context import Context
from arkv_fx.passes.nodes import op_name
from torch import Tensor
from torch.fx import GraphModule

import arkv_fx.ops.schema  # noqa: F401  (registers the marker)
from arkv_fx import ArkvConfig
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.state.session import Session

# A short ring, so that prompts reach the tier, whose slots each head orders in its own way.
ROOMY = ArkvConfig(budget=64, tiers=("native",), window=2, sinks=1)
HEADS, GROUPS, DIM = 2, 3, 8

Function = Callable[..., Any]


@dataclass
class Rewritten:
    """A captured graph, what the passes made of it, and what they found."""

    before: GraphModule
    after: GraphModule
    context: Context

    def count(self, name: str) -> tuple[int, int]:
        """Nodes of that operator before and after."""
        return tuple(  # type: ignore[return-value]
            sum(op_name(n) == name for n in g.graph.nodes) for g in (self.before, self.after)
        )

    @property
    def reasons(self) -> list[str]:
        return [s.reason for s in self.context.sites]


def apply(function: Function, *args: Any, config: ArkvConfig = ROOMY, **options: Any) -> Rewritten:
    """Capture with Dynamo and run the passes."""
    found: list[Rewritten] = []

    def backend(graph: GraphModule, _: Any) -> Function:
        context = Context(config, **options)
        found.append(Rewritten(graph, pipeline.apply(graph, context), context))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    assert len(found) == 1
    return found[0]


def session() -> Session:
    new = Session("a test")
    new.active = True
    return new


def capture(
    function: Function, *args: Any, config: ArkvConfig = ROOMY, **options: Any
) -> Rewritten:
    """`apply` for functions over a marker, for six new tokens."""
    owner = session()
    return apply(function, *args, owner.handle, 6, config=config, **options)


def tensors(length: int, query_heads: int = HEADS * GROUPS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, h, length, DIM, generator=generator)
            for h in (query_heads, HEADS, HEADS)]  # fmt: skip


def cached(
    expand: Callable[[Tensor], Tensor] = lambda x: x,
    attention: Function = F.scaled_dot_product_attention,
    expand_values: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Function:
    """An attention over a marker, as transformers writes it."""

    def function(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, total: int) -> Tensor:
        keys, values = torch.ops.arkv.kv_update(k, v, handle, 0, total)
        many = q.shape[2] > 1
        settings = {"is_causal": many, **options}
        return attention(q, expand(keys), (expand_values or expand)(values), **settings)

    return function


def check_output(
    function: Function, query_heads: int = HEADS * GROUPS, steps: tuple[int, ...] = (6, 1, 1)
) -> ArkvBackend:
    """A prompt and two decode steps give what the function itself gives, rewritten or not."""
    torch._dynamo.reset()
    backend = ArkvBackend(ROOMY, compile="eager")
    compiled = torch.compile(function, backend=backend)
    ours, plain = session(), session()
    total = 0
    for step, length in enumerate(steps):
        total += length
        inputs = tensors(length, query_heads, seed=step)
        expected = function(*inputs, plain.handle, total)
        torch.testing.assert_close(compiled(*inputs, ours.handle, total), expected)
    return backend


def lift(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, GROUPS, s, d).reshape(b, h * GROUPS, s, d)


def unsqueezed(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x.unsqueeze(2).expand(-1, -1, GROUPS, -1, -1).contiguous().view(b, h * GROUPS, s, d)


def flattened(x: Tensor) -> Tensor:
    return x.unsqueeze(-3).expand(-1, -1, GROUPS, -1, -1).flatten(1, 2)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(GROUPS, dim=1)


def interleaved_function(x: Tensor) -> Tensor:
    return torch.repeat_interleave(x, GROUPS, -3).to(x.dtype)


def repeated(x: Tensor) -> Tensor:
    return x.repeat(1, GROUPS, 1, 1)


def tiled(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x[:, None].expand(b, GROUPS, h, s, d).reshape(b, h * GROUPS, s, d)


def transposed(x: Tensor) -> Tensor:
    b, h, s, d = x.shape
    return x.unsqueeze(2).expand(b, h, GROUPS, s, d).transpose(1, 2).reshape(b, h * GROUPS, s, d)
