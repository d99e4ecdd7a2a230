"""A rewritten graph and what its inputs stand for, whichever front end it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from arkv_fx.errors import ExportError, TransformError
from arkv_fx.insert.cached_model import random_ids
from arkv_fx.passes.sites import Planned, Site

PROMPT = 13  # tokens of the sample: a size that no other extent of a model is likely to have


@dataclass
class Call:
    """One call of a rewritten graph: its attention sites, what it was given and what it gave.

    ``written`` are the inputs that the call wrote to, by identity.
    """

    graph: GraphModule
    sites: list[Site]
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    written: set[int]

    @classmethod
    def make(
        cls, graph: GraphModule, sites: list[Site], inputs: Sequence[Any], run: Callable[..., Any]
    ) -> Call:
        """Call ``run``, which computes what the graph does."""
        tensors = [x for x in inputs if isinstance(x, Tensor) and not x.is_inference()]
        before = [x._version for x in tensors]
        outputs = run(*inputs)
        written = {id(x) for x, old in zip(tensors, before, strict=True) if x._version != old}
        return cls(graph, sites, inputs, outputs, written)


@dataclass
class Captured:
    """One rewritten graph of a model.

    ``constants`` names the parameter or buffer behind a placeholder, ``inputs`` the argument;
    ``sizes`` the (argument, dimension) behind a symbolic size; ``sites`` the first site of each
    cached layer; ``logits`` is the output that matters. ``values`` are constants that no module
    holds, by the names in ``constants``; ``arguments`` are what the graph takes beside the state,
    and ``bound`` the most tokens that the model knows positions for, if it has an end. Placeholders
    that the passes added have a role, see ``passes.roles``.
    """

    graph: GraphModule
    constants: dict[str, str]
    inputs: dict[str, str]
    sizes: dict[str, tuple[str, int]]
    sites: list[Planned]
    logits: int
    values: dict[str, Tensor]
    arguments: tuple[str, ...]
    bound: int | None = None


def check_model(model: nn.Module) -> None:
    """Refuse a model that is transformed, or in training mode."""
    if hasattr(model, "arkv"):
        raise TransformError("the model is transformed: call arkv_fx.restore(model) first")
    if model.training:
        raise ExportError(f"{type(model).__name__} is in training mode: call model.eval()")


def sample_ids(model: nn.Module, batch: int) -> Tensor:
    """Token ids [batch, tokens] that every embedding of the model knows.

    Raises:
        ExportError: if it has none.
    """
    ids = random_ids(model, batch)
    if ids is None:
        raise ExportError(f"{type(model).__name__}: it has no embedding of tokens")
    return ids


def check_sites(name: str, sites: Sequence[Site]) -> None:
    """Refuse attention over a cache that is left alone, with the reasons."""
    refused = [f"  {s.name}: {s.reason}" for s in sites if s.source and not s.fused]
    if refused:
        raise ExportError(
            f"{name}: attention over its cache cannot be rewritten, so nothing is exported\n"
            + "\n".join(refused)
        )


def check_constants(name: str, call: Call, constants: Mapping[str, str]) -> None:
    """Refuse a graph that writes to a tensor of the model, given by placeholder, and reads it."""
    nodes = call.graph.graph.find_nodes(op="placeholder")
    for node, value in zip(nodes, call.inputs, strict=False):
        if node.name in constants and id(value) in call.written and node.users:
            raise ExportError(
                f"{name}: it writes to {constants[node.name]} in every call, a state that the "
                "exported graphs would lose"
            )


def stray(name: str, node: Node, value: Any) -> str:
    """What is wrong with an input of a graph that stands for nothing."""
    what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"the value {value}"
    readers = ", ".join(user.format_node() or user.name for user in list(node.users)[:2])
    return (
        f"{name}: its graph reads {what} ({node.name}) that is no argument and no parameter, so it "
        f"would be frozen as it is now; read by {readers}"
    )


def names_of(model: nn.Module) -> dict[int, str]:
    """Names of a model's tensors by their identity: parameters, buffers, other attributes."""
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    for path, module in model.named_modules():  # constants that are no buffers
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                names.setdefault(id(value), f"{path}.{key}".lstrip("."))
    return names
