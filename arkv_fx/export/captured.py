"""A rewritten graph and what its inputs stand for, whichever front end it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule

from arkv_fx.passes.site import Site

STATE = "arkv_state_"


@dataclass
class Captured:
    """One rewritten graph of a model.

    ``constants`` names the parameter or buffer behind a placeholder, ``inputs`` the argument;
    ``sizes`` the (argument, dimension) behind a symbolic size; ``states`` the placeholders of each
    cached layer's state, whose first site is in ``sites``; ``logits`` is the output that matters.
    ``values`` are constants that no module holds, by the names in ``constants``; ``arguments`` are
    what the graph takes beside the state, ``offset`` a placeholder for the number of tokens before
    this call, and ``bound`` the most tokens that the model knows positions for, if it has an end.
    """

    graph: GraphModule
    constants: dict[str, str]
    inputs: dict[str, str]
    sizes: dict[str, tuple[str, int]]
    sites: list[Site]
    states: list[list[str]]
    logits: int
    values: dict[str, Tensor]
    arguments: tuple[str, ...]
    offset: str = ""
    bound: int | None = None


def names_of(model: nn.Module) -> dict[int, str]:
    """Names of a model's tensors by their identity: parameters, buffers, other attributes."""
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    for path, module in model.named_modules():  # constants that are no buffers
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                names.setdefault(id(value), f"{path}.{key}".lstrip("."))
    return names


def state_inputs(graph: GraphModule) -> list[list[str]]:
    """The placeholders of each cache's state, as ``passes.rewrite`` names them."""
    found: dict[str, list[str]] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        if node.name.startswith(STATE):
            found.setdefault(node.name.split("_")[2], []).append(node.name)
    return list(found.values())
