"""Reading FX nodes whatever their spelling: function, method or aten overload."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from arkv_fx.errors import PassError

IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "iand", "ior", "ixor"}
ARITHMETIC = {"add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne"}


def op_name(node: Any) -> str:
    """The bare name of what a node calls ("cat", "scaled_dot_product_attention"), or ""."""
    if not isinstance(node, Node):
        return ""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target = node.target
    if target is getattr:
        return str(node.args[1])  # `x.mT` reads like `x.mT()`
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.split("::")[-1]
    return getattr(target, "__name__", "")


def writes_in_place(node: Any) -> bool:
    """Whether a node's name says that it changes its first argument: ``add_``, ``+=``."""
    name = op_name(node)
    named = name.endswith("_") and name not in ("and_", "or_") and not name.endswith("__")
    return named or name in IN_PLACE


def written(node: Node) -> list[Node]:
    """The nodes whose values a call says that it changes."""
    target, found = node.target, [node.kwargs.get("out")]
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        given = arguments(node, [each.name for each in schema])
        found = [given.get(a.name) for a in schema if a.alias_info and a.alias_info.is_write]
    elif writes_in_place(node) or op_name(node) == "setitem" or _asked_in_place(node):
        found += node.args[:1] or [node.kwargs.get("input")]
    return [each for each in tree_leaves(found) if isinstance(each, Node)]


def _asked_in_place(node: Node) -> bool:
    """Whether a function of torch.nn.functional is told to work in place."""
    by_place = getattr(node.target, "__module__", None) == "torch.nn.functional"
    return node.kwargs.get("inplace") is True or (by_place and any(x is True for x in node.args))


def may_write(node: Node) -> bool:
    """Whether a node may change a tensor that was there before, as far as its call says."""
    if node.op == "call_module":
        return True
    hidden = isinstance(node.target, torch._ops.OperatorBase)  # of higher order
    hidden = hidden and not isinstance(node.target, torch._ops.OpOverload)
    return hidden or bool(written(node))


def example(node: Any) -> Any:
    """The fake value that tracing recorded for a node, or None."""
    if not isinstance(node, Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))


def shape(node: Any) -> tuple[Any, ...] | None:
    """Shape of a node's value, entries int or SymInt; None if it is no tensor."""
    value = example(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def sizes_of(node: Any) -> tuple[Any, ...]:
    """``shape`` where there must be one.

    Raises:
        PassError: naming the node, if its value is no tensor.
    """
    found = shape(node)
    if found is None:
        what = node.format_node() if isinstance(node, Node) else repr(node)
        raise PassError(f"{what} has no shape where a pass needs one: trace it with fake tensors")
    return found


def rank_of(node: Any) -> int:
    """Number of dimensions of a node's value, 0 if it is no tensor."""
    return len(shape(node) or ())


def arguments(node: Node, names: list[str]) -> dict[str, Any]:
    """A call's arguments by name, positional ones named in order."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def numbers(node: Node, name: str) -> list[int] | None:
    """The ints that a tensor's method takes behind it, or by ``name``; None if not all are known.

    ``x.permute(0, 2, 1)``, ``x.permute((0, 2, 1))`` and ``x.permute(dims=(0, 2, 1))``.
    """
    given: list[Any] = list(node.args[1:]) or [node.kwargs.get(name)]
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = list(given[0])
    return given if all(isinstance(value, int) for value in given) else None


def whole_index(index: Any, rank: int) -> tuple[Any, ...]:
    """A tensor's index as a tuple, with the dimensions of size ``rank`` that ``...`` stands for."""
    given = index if isinstance(index, tuple) else (index,)
    if Ellipsis not in given:
        return given
    at = given.index(Ellipsis)
    missing = rank + 1 - sum(i is not None for i in given)
    return (*given[:at], *[slice(None)] * missing, *given[at + 1 :])


def module_path(node: Node) -> str:
    """Dotted path of the module that a node was traced in, "" if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    if not paths:
        return ""
    # Dynamo writes where it found the module: L['self'].model, L['function'].__self__.model.
    path = re.sub(r"^L\['\w+'\]\.?(__self__\.?)?", "", str(paths[-1]))
    return path.replace("_modules['", "").replace("']", "").replace("['", ".")


def same_size(a: Any, b: Any) -> bool:
    """Equality of two extents without adding a guard on a symbol."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def is_symbol(size: Any, symbol: Any) -> bool:
    """Whether an extent is just this symbol."""
    return isinstance(size, torch.SymInt) and size.node.expr == symbol


def constant(value: Any) -> float | None:
    """A number, also where it was put into a tensor; None if ``value`` is computed."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    name = op_name(value)
    if name in ("to", "cuda", "type_as", "lift_fresh_copy", "float"):
        return constant(value.args[0])
    if name in ("tensor", "scalar_tensor", "as_tensor"):
        return constant(value.args[0])
    if name in ("full", "full_like", "new_full"):
        return constant(arguments(value, ["size", "fill_value"]).get("fill_value"))
    return None
