"""The two graphs of a model as ``ExportedProgram``s, which every target starts from."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ExportError
from arkv_fx.exporting.absorbed import capture_absorbed
from arkv_fx.exporting.capture import capture
from arkv_fx.exporting.captured import PROMPT
from arkv_fx.exporting.export_plan import ExportPlan
from arkv_fx.exporting.groups import Group, group_layers
from arkv_fx.exporting.inserted import capture_inserted
from arkv_fx.exporting.stateless import Step
from arkv_fx.formats.graph_operators import traced_to_leave
from arkv_fx.huggingface.layers import cached_layers

PAST, PRESENT = "past_key_values", "present"


@dataclass
class Graph:
    """One graph with the names and sample values of what goes in, and the names of what comes out.

    ``weights`` says which parameter of the model is behind a buffer's name.
    """

    name: str
    program: ExportedProgram
    inputs: dict[str, Tensor]
    outputs: list[str]
    weights: dict[str, str]


@dataclass
class Programs:
    """A prompt's graph, a decoded token's and the state that goes between them.

    ``least`` is the smallest number of tokens that the prompt's graph takes, ``bound`` the most
    that a text may have, if the model's positions end. ``fused()`` makes the decode graph for
    compilers that fuse sums with the decoding of what is summed: products of matrices over the
    state are spelled out.
    """

    prefill: Graph
    decode: Graph
    fused: Callable[[], Graph]
    groups: list[Group]
    batch: int
    least: int
    bound: int | None

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        (output,) = self.decode.program.graph.find_nodes(op="output")
        return int(output.args[0][0].meta["val"].shape[-1])

    @property
    def graphs(self) -> list[Graph]:
        """Both."""
        return [self.prefill, self.decode]


def make_programs(
    model: nn.Module, config: ArkvConfig, calibration: Calibration | None, batch: int,
    insert_cache: bool = False,
) -> Programs:  # fmt: skip
    """Capture, give the state names, and export; the model is left as it was.

    Raises:
        ExportError: if anything would be lost.
    """
    own = capture if cached_layers(model) else capture_absorbed
    front = capture_inserted if insert_cache else own
    prompt, token = front(model, config, calibration, batch)
    plans = [ExportPlan.of(s.plan, s.site.name) for s in prompt.sites]
    if [s.plan for s in token.sites] != [s.plan for s in prompt.sites]:
        raise ExportError(
            f"{type(model).__name__}: its prompt and its steps do not cache the same layers"
        )
    groups = group_layers(plans, batch)
    least = max(plan.window for plan in plans) + 1
    device = next(model.parameters()).device
    ids = torch.zeros(batch, least + PROMPT, dtype=torch.long, device=device)
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1], device=device).expand_as(ids).contiguous(),
    }
    given = {name: given[name] for name in prompt.arguments}
    one = {"input_ids": ids[:, :1].clone(), "position_ids": ids[:, :1].clone()}
    for group in groups:
        tensors = (x.to(device) for x in group.empty())
        one.update(zip(group.names(PAST), tensors, strict=True))
    outputs = ["logits", *(name for group in groups for name in group.names(PRESENT))]
    free = {name: {1: Dim("tokens", min=least)} for name in given}

    def decode(kernel: str) -> Graph:
        return _graph("decode", Step(model, token, groups, False, kernel), one, outputs, None)

    return Programs(
        _graph("prefill", Step(model, prompt, groups, True), given, outputs, free),
        decode("export"), partial(decode, "export_sums"), groups, batch, least, prompt.bound,
    )  # fmt: skip


@contextmanager
def _plain_min() -> Generator[None]:
    """Within it torch's own rules for views compare two strides by Python's ``min``.

    The export puts a symbolic one in its place everywhere. Before torch 2.13 that does not see that
    8 T is less than 16 T, and dimensions with a free T below them could not be flattened.
    """
    with patch.object(torch._prims, "min", min, create=True):
        yield


def _graph(
    name: str, step: Step, inputs: dict[str, Tensor], outputs: list[str],
    free: dict[str, Any] | None,
) -> Graph:  # fmt: skip
    step.eval()
    shapes = (tuple(free[n] for n in inputs),) if free else None
    try:
        with torch.no_grad(), _plain_min(), traced_to_leave():
            program = torch.export.export(
                step, tuple(inputs.values()), dynamic_shapes=shapes, strict=False
            )
    except torch._dynamo.exc.UserError as error:
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        raise ExportError(
            f"the {name} graph does not serve prompts of every length: {' '.join(lines[1:3])}"
        ) from error
    return Graph(name, program, inputs, outputs, step.weights)
