"""The arguments of our operators: their schemas, what is written into a graph, what is read there.

In a graph nodes stand for the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Generic, Self, TypeVar

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.as_given import as_given
from arkv_fx.plan import LayerPlan

T = TypeVar("T")
SCHEMA = {
    "T": "Tensor", "T | None": "Tensor?", "Sequence[T]": "Tensor[]",
    "Sequence[T] | None": "Tensor[]?", "str": "str", "float": "float", "bool": "bool",
}  # fmt: skip
"""Types of fields, as they are written below, in torch's schemas."""


@dataclass(frozen=True)
class Arguments(Generic[T]):
    """The arguments of an operator, in their order; ``T`` is what stands for a tensor."""

    @classmethod
    def schema(cls, written: Collection[str] = ()) -> str:
        """The arguments as a schema has them; those ``written`` are changed in place."""
        parts = []
        for f in fields(cls):
            kind = SCHEMA[str(f.type)]
            kind = kind.replace("Tensor", "Tensor(a!)") if f.name in written else kind
            default = "" if f.default is MISSING else f"={f.default!r}"
            parts.append(f"{kind} {f.name}{default}")
        return ", ".join(parts)

    @classmethod
    def of(cls, node: Node, values: Callable[[Node], Any] | None = None) -> Self:
        """What a call in a graph is given: nodes, or the ``values`` of these."""
        given: Any = (node.args, node.kwargs)
        args, kwargs = given if values is None else map_arg(given, values)
        return cls(*args, **kwargs)

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call by place and by name; what is as it is by default is left out."""
        values = [(f, getattr(self, f.name)) for f in fields(self)]
        placed = tuple(value for f, value in values if f.default is MISSING)
        named = {f.name: value for f, value in values if f.default not in (MISSING, value)}
        return placed, named

    def write(self, node: Node) -> None:
        """Let a call in a graph be given these."""
        node.args, node.kwargs = self.call()


@dataclass(frozen=True)
class AttendArguments(Arguments[T]):
    """Of ``arkv::attend`` and ``arkv::peek``; see ``ops.attend.attend`` for the shapes.

    ``plan`` is the text of a ``LayerPlan``; ``scale``, ``softcap`` and ``sink_logits`` are the
    site's ``Knobs``.
    """

    q: T
    k: T
    v: T
    mask: T | None
    state: Sequence[T]
    plan: str
    scale: float
    softcap: float
    sink_logits: T | None
    fresh: bool
    kernel: str = "reference"
    computed: Sequence[T] | None = None

    @property
    def layer_plan(self) -> LayerPlan:
        """The plan that ``plan`` spells."""
        return LayerPlan.parse(self.plan)

    @property
    def knobs(self: AttendArguments[Tensor]) -> Knobs:
        """What is the site's own."""
        return Knobs(self.scale, self.softcap, self.sink_logits)

    def run(
        self: AttendArguments[Tensor], attention: Callable[..., Tensor],
        plan: LayerPlan | None = None,
    ) -> Tensor:  # fmt: skip
        """Call ``attend`` or ``peek`` of ``ops.attend``, under another plan if one is given."""
        with as_given(self.q):
            return attention(
                self.q, self.k, self.v, self.mask, self.state, plan or self.layer_plan,
                self.knobs, self.fresh, self.kernel, self.computed,
            )  # fmt: skip


@dataclass(frozen=True)
class ColumnsArguments(Arguments[T]):
    """Of ``arkv::columns``; see ``ops.attend.columns``."""

    k: T
    v: T
    state: Sequence[T]
    plan: str
    fresh: bool
