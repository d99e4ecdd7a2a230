"""A rewritten graph run as it is: with the fastest kernels of its device, or the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx.compile.fast_linear import fast_products
from arkv_fx.kernels import usable
from arkv_fx.ops.signatures import AttendArguments
from arkv_fx.passes.nodes import example

ATTENTIONS = (torch.ops.arkv.attend.default, torch.ops.arkv.peek.default)
UNCOMPILED = ("eager", "reference")
"""Lowerings that run a graph as it is."""


def run_as_it_is(graph: GraphModule, lowering: str) -> Callable[..., Any]:
    """A graph's forward; for "eager" attention and products are given the fastest kernels first.

    What "inductor" does not compile, because it is read while it runs, gets the products.
    """
    if lowering != "reference":
        fast_products(graph)
    if lowering == "eager":
        for node in graph.graph.nodes:
            if node.target in ATTENTIONS:
                given: AttendArguments[Node] = AttendArguments.of(node)
                best = usable(example(given.q).device, given.layer_plan, compiled=False)[0]
                replace(given, kernel=best).write(node)
        graph.recompile()
    forward: Callable[..., Any] = graph.forward
    return forward
