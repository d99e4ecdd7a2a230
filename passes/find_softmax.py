"""Find attention written by hand: ``softmax(q @ k.T * scale + mask) @ v`` in its spellings.

Between the product and the softmax it understands scaling by constants, soft-capping by tanh,
masks and biases (added, subtracted, ``where``, ``masked_fill``, ``baddbmm``), casts, views that
merge batch and heads, sinks by ``cat``, and steps without effect (the row's maximum taken off, a
floor at the lowest number, dropout that is off). Does NOT fire where the probabilities themselves
are used or returned, nor on anything else in between; a cache behind such a softmax stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from arkv_fx.passes import lse_sinks
from arkv_fx.passes.context import Context
from arkv_fx.passes.contract import Pass
from arkv_fx.passes.layout import Axis, Dims, advance, names, source_of
from arkv_fx.passes.nodes import (
    arguments,
    constant,
    example,
    module_path,
    op_name,
    rank_of,
    sizes_of,
)
from arkv_fx.passes.pairing import look_through
from arkv_fx.passes.products import Product, product
from arkv_fx.passes.readers import SIZES
from arkv_fx.passes.sites import DROPOUT, HIDES, Bias, Site
from torch.fx import GraphModule, Node

ADDS = {"add", "iadd", "add_", "sub", "isub", "sub_"}
SCALES = {"mul", "imul", "mul_", "div", "truediv", "itruediv", "div_"}


def run(graph: GraphModule, context: Context) -> int:
    """Append a ``Site`` to ``context.sites`` for each softmax between two products."""
    before = len(context.sites)
    for node in graph.graph.nodes:
        if op_name(node) in ("softmax", "_softmax", "_safe_softmax"):
            site = read(node, len(context.sites))
            if site is not None:
                context.sites.append(site)
    return len(context.sites) - before


PASS = Pass("find_softmax", run, gives=("sites",))


@dataclass
class _Logits:
    """What is known of the logits while their steps are followed towards the softmax."""

    layout: Dims
    scale: float
    softcap: float = 0.0
    sinks: Node | None = None
    biases: list[Bias] = field(default_factory=list)
    reason: str = ""

    def times(self, factor: float) -> None:
        """Multiply all that has been gathered."""
        if self.sinks is not None:
            self.reason = self.reason or "the logits are scaled behind their sinks"
        if self.softcap:
            self.softcap *= factor
        self.scale *= factor
        self.biases = [Bias(b.node, b.layout, b.factor * factor, b.drop) for b in self.biases]


def read(softmax: Node, ordinal: int) -> Site | None:
    """The attention around a softmax; None if it is something else."""
    path = _path_from_product(softmax)
    tail = _path_to_product(softmax)
    if path is None or tail is None:
        return None
    first, steps = path
    last, after = tail
    site = Site(
        last.node, ordinal, module_path(softmax), first.left, first.right, last.right,
        products=[first.node, last.node],
    )  # fmt: skip
    look_through(site, k_token=first.token, probabilities=last.left)
    if site.reason:
        return site
    logits = _Logits(site.layout, first.alpha)
    scaled = lse_sinks.find(softmax.args[0], last.node)  # type: ignore[arg-type]
    chain = [first.node, *steps]
    for node, following in zip(chain, [*steps, softmax], strict=True):
        if other := _other_reader(node, following, scaled is not None):
            logits.reason = f"the logits are also read by {other.format_node()}"
    if first.added is not None:
        logits.biases.append(Bias(first.added, site.layout, first.beta))
    before = first.node
    for step in steps:
        _follow(step, before, logits)
        before = step
    dims = _along_rows(softmax, logits)
    for step in after:
        dims, logits.reason = _after(step, dims, logits)
    if not logits.reason and names(dims[:-2]) != names(site.out_layout):
        logits.reason = "probabilities and values differ in how batch and heads are laid out"
    if logits.reason:
        site.refuse(logits.reason, lasting=logits.reason != DROPOUT)
    site.scale, site.softcap, site.sinks = logits.scale, logits.softcap, logits.sinks
    site.biases = logits.biases
    if scaled is not None:
        site.node, site.sinks = scaled
        if logits.sinks is not None:
            site.refuse("the logits have sinks before and behind their softmax")
    return site


def _other_reader(node: Node, following: Node, scaled: bool) -> Node | None:
    """Who reads the logits besides the next step, and needs them for anything but that."""
    for user in node.users:
        dtype_only = op_name(user) == "type_as" and user.args[0] is not node
        harmless = dtype_only or op_name(user) in SIZES | ({"logsumexp"} if scaled else set())
        own_maximum = any(_is_own_maximum(arg, node) for arg in following.args)
        if user is not following and not harmless and not (own_maximum and "max" in op_name(user)):
            return user
    return None


def _path_from_product(softmax: Node) -> tuple[Product, list[Node]] | None:
    """The product that makes the logits, and the steps from there to the softmax."""
    node: Any = softmax.args[0] if softmax.args else softmax.kwargs.get("input")
    steps: list[Node] = []
    while isinstance(node, Node):
        if (found := product(node)) is not None:
            return found, steps[::-1]
        steps.append(node)
        node = _logits_before(node)
    return None


def _logits_before(node: Node) -> Node | None:
    """Which input of a step holds the logits: the one with a product behind it."""
    name = op_name(node)
    inputs: list[Any] = list(node.args)
    if name == "where":
        inputs = inputs[1:3]
    elif name in ("cat", "concat"):
        inputs = list(arguments(node, ["tensors"])["tensors"])[:1]
    elif name in ADDS | SCALES | {"max", "maximum"}:
        inputs = inputs[:2]
    else:
        inputs = inputs[:1]
    nodes = [n for n in inputs if isinstance(n, Node) and rank_of(n) > 1]
    return (
        next((n for n in nodes if _reaches_product(n)), None)
        if len(nodes) > 1
        else (nodes[0] if nodes else None)
    )


def _reaches_product(node: Node) -> bool:
    while product(node) is None:
        before = _logits_before(node)
        if before is None:
            return False
        node = before
    return True


def _path_to_product(softmax: Node) -> tuple[Product, list[Node]] | None:
    """The product with the values, and the steps from the softmax to there."""
    node, steps = softmax, list[Node]()
    while True:
        users = [u for u in node.users if u.users or u.op == "output"] or [*node.users]
        if len(users) != 1:
            return None
        user = users[0]
        found = product(user)
        if found is not None:
            return (found, steps) if found.left is node else None
        if user.op == "output" or user.args[:1] != (node,):
            return None
        steps.append(user)
        node = user


def _along_rows(softmax: Node, logits: _Logits) -> Dims:
    """The dimensions of the probabilities; refuses a softmax over anything but keys."""
    rank = rank_of(softmax)
    dim = arguments(softmax, ["input", "dim"]).get("dim")
    if not isinstance(dim, int) or dim % rank != rank - 1:
        logits.reason = logits.reason or f"the softmax runs over dimension {dim}, not over the keys"
    return _dims(softmax, logits.layout)


def _dims(node: Node, layout: Dims) -> Dims:
    """The dimensions of logits or probabilities with that layout."""
    sizes = sizes_of(node)
    return (*layout, (Axis("tokens", sizes[-2]),), (Axis("keys", sizes[-1]),))


def _follow(step: Node, before: Node, logits: _Logits) -> None:
    """Take one step between the product and the softmax into account."""
    name = op_name(step)
    if source_of(step) is before:
        dims = _dims(before, logits.layout)
        moved = advance(step, dims)
        if moved is None or len(moved) < 2 or names(moved[-2:]) != names(dims[-2:]):
            logits.reason = f"{step.format_node()} mixes the axes of the logits"
        else:
            logits.layout = moved[:-2]
        return
    given = [*step.args, *step.kwargs.values()]
    others = [a for a in given if a is not before]
    if given.count(before) > 1:
        logits.reason = f"{step.format_node()} takes the logits twice"
    elif name in SCALES:
        factor = constant(others[0])
        if factor is None or (step.args[0] is not before and "div" in name):
            logits.reason = f"the logits are scaled by {others[0]}, which is not a constant"
        else:
            logits.times(1 / factor if "div" in name else factor)
    elif name in ADDS:
        _add(step, before, others[0], logits)
    elif name == "tanh":
        if logits.biases or logits.softcap:
            logits.reason = "soft-capping comes behind a mask or a bias"
        logits.softcap = 1.0
    elif name in ("where", "masked_fill", "masked_fill_"):
        _hide(step, before, logits)
    elif name in ("max", "maximum", "clamp", "clip", "clamp_min"):
        floor = constant(others[0]) if others else constant(step.kwargs.get("min"))
        if floor is None or floor > HIDES or len(others) > 1:
            logits.reason = f"{step.format_node()} changes logits that are not masked"
    elif name in ("cat", "concat"):
        _sink(step, before, logits)
    elif name not in ("dropout",) or not _off(step):
        logits.reason = logits.reason or f"{step.format_node()} between the product and its softmax"


def _add(step: Node, before: Node, other: Any, logits: _Logits) -> None:
    sign = 1.0
    if "sub" in op_name(step):
        sign = -1.0
        if step.args[0] is not before:
            logits.reason = "the logits are subtracted from something"
    if _is_own_maximum(other, before):
        return  # a softmax does not change if the same is taken off all of a row
    if not isinstance(other, Node) or logits.sinks is not None:
        logits.reason = logits.reason or f"{step.format_node()} between the product and its softmax"
        return
    logits.biases.append(Bias(other, logits.layout, sign))


def _is_own_maximum(other: Any, logits: Node) -> bool:
    if op_name(other) in ("values", "getitem"):  # .values of max(dim=-1, keepdim=True)
        other = other.args[0]
    return op_name(other) in ("max", "amax") and other.args[0] is logits


def _hide(step: Node, before: Node, logits: _Logits) -> None:
    """``where(shown, logits, low)``, ``where(hidden, low, logits)``, ``masked_fill``."""
    if op_name(step) == "where":
        given = arguments(step, ["condition", "input", "other"])
        drop = given["other"] is before
        mask, low = given["condition"], given["input" if drop else "other"]
    else:
        given = arguments(step, ["input", "mask", "value"])
        drop, mask, low = True, given["mask"], given["value"]
    value = constant(low)
    if value is None or value > HIDES:
        logits.reason = f"{step.format_node()} puts {low} in place of a logit, which hides nothing"
    elif not isinstance(mask, Node) or example(mask).dtype != torch.bool:
        logits.reason = f"{step.format_node()} masks with something that is not a bool"
    else:
        logits.biases.append(Bias(mask, logits.layout, drop=drop))


def _sink(step: Node, before: Node, logits: _Logits) -> None:
    """``cat([logits, sinks], -1)`` with one number per query head."""
    given = arguments(step, ["tensors", "dim"])
    parts, rank = given["tensors"], rank_of(step)
    sinks = parts[1] if len(parts) == 2 and parts[0] is before else None
    while isinstance(sinks, Node) and op_name(sinks) in ("expand", "reshape", "view", "to"):
        sinks = sinks.args[0]
    plain = len(logits.layout) == 2 and isinstance(sinks, Node) and rank_of(sinks) == 1
    if not plain or given.get("dim") not in (-1, rank - 1):
        logits.reason = "what is joined to the logits is not one number per head"
        return
    logits.sinks = sinks


def _after(step: Node, dims: Dims, logits: _Logits) -> tuple[Dims, str]:
    """Take one step between the softmax and the product with the values into account."""
    if source_of(step) is not None and op_name(step) != "getitem":
        moved = advance(step, dims)
        return (
            (dims, "the probabilities are rearranged") if moved is None else (moved, logits.reason)
        )
    if op_name(step) in ("to", "_to_copy", "type_as", "type", "half", "bfloat16"):
        return dims, logits.reason  # our sums are in float32
    if op_name(step) in ("dropout", "dropout_"):
        return dims, logits.reason or ("" if _off(step) else DROPOUT)
    if op_name(step) == "getitem" and logits.sinks is not None:
        index = step.args[1]
        if isinstance(index, tuple) and index[-1] == slice(None, -1, None):
            return dims, logits.reason
    return dims, logits.reason or f"{step.format_node()} between the softmax and the values"


def _off(dropout: Node) -> bool:
    given = arguments(dropout, ["input", "p", "training"])
    return given.get("p") == 0.0 or given.get("training") is False
