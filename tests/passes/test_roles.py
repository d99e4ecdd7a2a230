"""What the inputs that the passes add are is noted on them: neither name nor place tells it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from arkv_fx.passes.roles import Role, add_input, added, added_in_order, kept, role_of
from pass_harness import Rewritten, apply, cached, capture, lift, tensors
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.split_module import split_module

from arkv_fx.compile.replay_inputs import Kind, kinds


def two_layers(q: Tensor, k: Tensor, v: Tensor, *past: Tensor) -> Any:
    kept = []
    for keys, values in (past[:2], past[2:]):
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        q = F.scaled_dot_product_attention(q, lift(keys), lift(values)) * 2
        kept += [keys, values]
    return q, kept


def one_token() -> Rewritten:
    past = [x for seed in (1, 2) for x in tensors(5, seed=seed)[1:]]
    return apply(two_layers, *tensors(1), *past)


def roles(graph: GraphModule) -> list[Role | None]:
    return [role_of(n) for n in graph.graph.find_nodes(op="placeholder")]


def test_every_added_input_has_a_role_and_no_other_has() -> None:
    out = one_token()
    own = len(out.before.graph.find_nodes(op="placeholder"))
    found = roles(out.after)
    expected: list[Role] = []
    for planned in out.context.caches:
        ordinal = planned.site.ordinal
        expected += [Role("state", ordinal, spec.name) for spec in planned.plan.specs()]
        expected.append(Role("anchor", ordinal))
    assert len(out.context.caches) == 2
    assert found == [None] * own + expected
    first, second = (planned.site.ordinal for planned in out.context.caches)
    assert added_in_order(out.after) == [
        ("state", first), ("anchor", first), ("state", second), ("anchor", second)
    ]  # fmt: skip


def test_a_prompt_without_a_cache_has_none() -> None:
    out = apply(lambda q, k, v: F.scaled_dot_product_attention(q, lift(k), lift(v)), *tensors(6))
    assert not added_in_order(out.after) and not any(roles(out.after))


@pytest.mark.parametrize("how", ["deepcopy", "graph", "split"])
def test_copies_keep_roles_and_names_say_nothing(how: str) -> None:
    graph = capture(cached(lift), *tensors(6)).after
    expected = roles(graph)
    for number, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        node.name = f"x{number}"
        node.target = node.name
    graph.recompile()
    if how == "deepcopy":
        twin = copy.deepcopy(graph)
    elif how == "graph":
        twin = GraphModule(graph, copy.deepcopy(graph.graph))
    else:
        twin = split_module(graph, graph, lambda node: 0)
    assert roles(twin) == expected and len(added(twin, "state")) > 5
    held = [node for node, kind in kinds(twin, ()).items() if kind is Kind.STATE]
    assert held or how == "split", "a piece reads them, not the graph around it"
    assert set(held) <= set(added(twin, "state"))


def test_new_examples_leave_the_role() -> None:
    graph = GraphModule({}, torch.fx.Graph())
    graph.graph.output(())
    node = add_input(graph, Role("offset"), torch.zeros((), dtype=torch.int64))
    node.meta = {**kept(node), "val": torch.ones(())}
    assert added(graph, "offset") == [node] and set(node.meta) == {"arkv_role", "val"}
