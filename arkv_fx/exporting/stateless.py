"""A captured graph as a module without hidden state: state tensors in, state tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves

from arkv_fx.errors import PassError
from arkv_fx.exporting.captured import Captured
from arkv_fx.exporting.experts import engine_forms
from arkv_fx.exporting.groups import Group
from arkv_fx.ops.arrivals import Arrivals
from arkv_fx.ops.attend import Seen, columns, look, peek, settle
from arkv_fx.ops.signatures import AttendArguments, ColumnsArguments
from arkv_fx.passes.roles import is_added, role_of
from arkv_fx.runtime.operators import grouped_mm
from arkv_fx.state.view import view

ATTEND = torch.ops.arkv.attend.default
PEEK = torch.ops.arkv.peek.default
COLUMNS = torch.ops.arkv.columns.default
GROUPED_MM = "transformers.grouped_mm_fallback"
"""An operator that is not there where transformers is not, so it does not leave with a graph."""


class Step(nn.Module):
    """One call of a model: ``forward(input_ids, ..., *state)`` gives logits and the new state.

    Args:
        model: whose parameters the graph reads.
        captured: the graph.
        groups: how its layers' states are stacked; the state is all groups' tensors in order.
        fresh: for a prompt, which begins with an empty state and takes none.
        kernel: "export", or "export_sums" without products of matrices over the state.
        engine: whether what compiles it is TensorRT.
    """

    def __init__(
        self, model: nn.Module, captured: Captured, groups: Sequence[Group], fresh: bool,
        kernel: str = "export", engine: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.captured, self.groups, self.fresh = captured, tuple(groups), fresh
        self.kernel = kernel
        self.forms = engine_forms(captured.graph.graph) if engine else {}
        self.weights = {_attribute(name): name for name in captured.constants.values()}
        for attribute, name in self.weights.items():
            value = captured.values.get(name)
            if value is None:
                owner, _, key = name.rpartition(".")
                value = getattr(model.get_submodule(owner), key)
            self.register_buffer(attribute, value.detach())

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """The captured graph's arguments in order, then the state."""
        names = self.captured.arguments
        given = dict(zip(names, args, strict=False))
        state = args[len(names) :]
        run = _Run(self, given, state)
        logits = run.logits()
        return (logits, *run.settled())


def _attribute(name: str) -> str:
    return name.replace(".", "_")


class _Run(Interpreter):
    """Runs the graph with our attention in place of the operators that the passes put there."""

    def __init__(self, step: Step, given: dict[str, Tensor], state: Sequence[Tensor]) -> None:
        super().__init__(step.captured.graph)
        self.step = step
        self.given = given
        rest = iter(state)
        self.states = [
            group.begun() if step.fresh else group.opened([next(rest) for _ in group.plan.specs()])
            for group in step.groups
        ]
        # Where the state of a cache of the graph is: (group, place in it).
        self.owner: dict[int | None, tuple[int, int]] = {}
        for g, group in enumerate(step.groups):
            for place, layer in enumerate(group.layers):
                self.owner[step.captured.sites[layer].site.ordinal] = g, place
        self.seen: dict[tuple[int, int], Seen] = {}

    def logits(self) -> Tensor:
        """Run everything; those of the last token [B, 1, vocabulary]."""
        outputs = tree_leaves(self.run(*self._inputs()))
        logits: Tensor = outputs[self.step.captured.logits]
        if logits.dtype == torch.bfloat16 and self.step.groups[0].plan.portable:
            logits = logits.float()
        return logits if logits.shape[1] == 1 else logits[:, -1:]

    def settled(self) -> list[Tensor]:
        """The new state: the layers of a group have their tokens moved all at once."""
        out: list[Tensor] = []
        for g, group in enumerate(self.step.groups):
            rows = [x.clone() for x in group.rows_of(self.states[g])]
            seen = [self.seen[g, place] for place in range(len(group.layers))]
            settle(view(group.plan, rows), _join(seen), self.step.fresh, self.step.kernel)
            out += group.closed(group.stack(rows))
        return out

    def _inputs(self) -> list[Any]:
        captured = self.step.captured
        values: list[Any] = []
        for node in captured.graph.graph.find_nodes(op="placeholder"):
            name = node.name
            if name in captured.inputs:
                values.append(self.given[captured.inputs[name]])
            elif name in captured.constants:
                values.append(getattr(self.step, _attribute(captured.constants[name])))
            elif is_added(node, "offset"):  # no padding, so the same for all sequences
                values.append(self.given["position_ids"][0, 0])
            elif name in captured.sizes:
                argument, dim = captured.sizes[name]
                values.append(self.given[argument].shape[dim])
            else:
                values.append(None)  # a state, which `run_node` looks up, or unused
        return values

    def run_node(self, n: Node) -> Any:
        if n in self.step.forms:
            args, named = self.fetch_args_kwargs_from_env(n)
            return self.step.forms[n](*args, **named)
        if str(n.target).startswith(GROUPED_MM):
            args, named = self.fetch_args_kwargs_from_env(n)
            return grouped_mm(*args, *named.values())
        if n.target not in (ATTEND, PEEK, COLUMNS):
            return super().run_node(n)
        operator = ColumnsArguments if n.target == COLUMNS else AttendArguments
        role = role_of(operator.of(n).state[0])
        if role is None:
            raise PassError(f"{n.format_node()}: its state is none that a pass has added")
        owner = self.owner[role.cache]
        group = self.step.groups[owner[0]]
        held = group.layer_of(self.states[owner[0]], owner[1])
        if n.target == COLUMNS:
            asked: ColumnsArguments[Tensor] = ColumnsArguments.of(n, self.env.__getitem__)
            return columns(asked.k, asked.v, held, group.plan, asked.fresh)
        given: AttendArguments[Tensor] = AttendArguments.of(n, self.env.__getitem__)
        if n.target == PEEK:
            return replace(given, state=held, kernel=self.step.kernel).run(peek, group.plan)
        out, self.seen[owner] = look(
            given.q, given.k, given.v, given.mask, view(group.plan, held), given.knobs, given.fresh,
            self.step.kernel, given.computed,
        )  # fmt: skip
        return out


def _join(seen: Sequence[Seen]) -> Seen:
    """The updates of several layers as that of one with all their sequences."""
    if len(seen) == 1:
        return seen[0]

    def cat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def each(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: cat([p[name] for p in parts]) for name in parts[0]}

    news = [s.new for s in seen]
    new = Arrivals(
        cat([n.k for n in news]),
        cat([n.v for n in news]),
        cat([n.pos for n in news]),
        cat([n.valid for n in news]),
        each([n.stats for n in news]),
    )
    return Seen(
        new,
        each([s.updated for s in seen]),
        each([s.layer for s in seen]),
        cat([s.finite for s in seen]),
        seen[0].padded,
    )
