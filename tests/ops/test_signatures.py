"""The operators' arguments: one record for the schema, what is written and what is read."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx.ops.signatures import Arguments, AttendArguments, ColumnsArguments

OPERATORS = {"attend": AttendArguments, "peek": AttendArguments, "columns": ColumnsArguments}


def operator(name: str) -> Any:
    return getattr(torch.ops.arkv, name).default


@pytest.mark.parametrize("name", OPERATORS)
def test_the_record_has_the_operators_arguments_in_their_order(name: str) -> None:
    found = operator(name)._schema.arguments
    assert [a.name for a in found] == [f.name for f in fields(OPERATORS[name])]
    written = [a.name for a in found if a.alias_info is not None and a.alias_info.is_write]
    assert written == (["state"] if name == "attend" else [])


def call(name: str, **more: Any) -> Node:
    """A call of an operator in a graph, all of whose tensors are inputs."""
    graph = Graph()
    given: dict[str, Any] = {
        "state": [graph.placeholder(f"state{i}") for i in range(3)], "plan": "{}", "scale": 0.5,
        "softcap": 0.0, "fresh": False, "kernel": "reference", "computed": None,
    }  # fmt: skip
    for f in fields(OPERATORS[name]):
        given.setdefault(f.name, graph.placeholder(f.name))
    named = {f.name: given[f.name] for f in fields(OPERATORS[name])} | more
    arguments: Arguments[Node] = OPERATORS[name](**named)
    return graph.call_function(operator(name), *arguments.call())


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_written_into_a_graph_is_read_there(name: str) -> None:
    node = call(name)
    assert not node.kwargs, "defaults are left out"
    args = node.args
    read: Arguments[Node] = OPERATORS[name].of(node)
    assert read.call() == (args, {})
    for f in fields(OPERATORS[name]):
        value = getattr(read, f.name)
        if isinstance(value, Node):
            assert value.name == f.name
    sizes = OPERATORS[name].of(node, lambda n: len(n.name))
    assert sizes.k == 1 and sizes.state == [6, 6, 6]


def test_one_argument_of_a_call_changes_alone() -> None:
    node = call("attend")
    before: AttendArguments[Node] = AttendArguments.of(node)
    replace(before, mask=None, kernel="cpp", computed=[before.k, before.v]).write(node)
    after: AttendArguments[Node] = AttendArguments.of(node)
    changed = {f.name for f in fields(after) if getattr(after, f.name) != getattr(before, f.name)}
    assert changed == {"mask", "kernel", "computed"}
    assert node.kwargs == {"kernel": "cpp", "computed": [before.k, before.v]}
    assert before.mask not in node.all_input_nodes
