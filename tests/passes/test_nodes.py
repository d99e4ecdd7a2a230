"""What a call says of the tensors that it changes, however it is spelled."""

import operator

import pytest
import torch
from arkv_fx.passes.nodes import may_write, written
from torch.fx import Graph, Node
from torch.nn import functional

ADD = torch.ops.aten.add
RESHAPE = torch.ops.aten.view.default


def _call(function, *args, **kwargs) -> tuple[Node, Node]:
    """A call of a function (or of a method, by its name) of x, and x; "x" stands for it."""
    graph = Graph()
    x = graph.placeholder("x")

    def at(value):
        return x if value == "x" else value

    given = tuple(map(at, args)), {name: at(value) for name, value in kwargs.items()}
    make = graph.call_method if isinstance(function, str) else graph.call_function
    return make(function, *given), x


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        ("add_", ("x", 1), {}),
        (operator.iadd, ("x", 1), {}),
        (operator.setitem, ("x", 0, 1), {}),
        (ADD.out, (0, 1), {"out": "x"}),
        (torch.ops.aten.add_.Tensor, ("x", 1), {}),
        (torch.ops.aten.add_.Tensor, (), {"self": "x", "other": 1}),
        (torch.ops.aten._foreach_add_.Scalar, (["x"], 1), {}),
        (functional.relu, ("x",), {"inplace": True}),
        (functional.relu, (), {"input": "x", "inplace": True}),
        (functional.relu, ("x", True), {}),
        (torch.add, (0, 1), {"out": "x"}),
    ],
)
def test_a_call_that_writes(function, args, kwargs):
    if args and isinstance(args[0], list):
        graph = Graph()
        x = graph.placeholder("x")
        node = graph.call_function(function, ([x], 1))
    else:
        node, x = _call(function, *args, **kwargs)
    assert written(node) == [x]
    assert may_write(node)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        ("add", ("x", 1), {}),
        (ADD.Tensor, ("x", 1), {}),
        (RESHAPE, ("x", [1]), {}),
        (functional.relu, ("x",), {"inplace": False}),
        (functional.softmax, ("x", 1), {}),  # a dimension, not a flag
        (operator.and_, ("x", True), {}),
    ],
)
def test_a_call_that_does_not(function, args, kwargs):
    node, _ = _call(function, *args, **kwargs)
    assert written(node) == []
    assert not may_write(node)


def test_what_hides_its_body_may_write():
    """A module and an operator of higher order say nothing of what they do inside."""
    graph = Graph()
    x = graph.placeholder("x")
    assert may_write(graph.call_module("layer", (x,)))
    assert may_write(graph.call_function(torch.ops.higher_order.cond, (True, None, None, (x,))))
    assert not may_write(x)
