"""The two graphs of a model as ``ExportedProgram``s, which every target starts from."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
from arkv_fx.exporting.captured import PROMPT, Captured
from arkv_fx.exporting.export_plan import ExportPlan, PortablePlan
from arkv_fx.exporting.groups import Group, group_layers
from arkv_fx.exporting.inserted import capture_inserted
from arkv_fx.exporting.stateless import Step
from arkv_fx.huggingface.layers import cached_layers, text_config
from arkv_fx.runtime.operators import traced_to_leave

PAST, PRESENT = "past_key_values", "present"
TOKENS = "tokens"
"""What the number of a prompt's tokens is called."""
MOST_SORTED = 3840
"""The largest K of TensorRT's TopK."""


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


class Programs:
    """A prompt's graph, a decoded token's and the state that goes between them.

    ``least`` is the smallest number of tokens that the prompt's graph takes, ``bound`` the most
    that a text may have, if the model's positions end. With ``portable`` the graphs take and give
    what every runtime has, see ``PortablePlan``; without it what torch and TensorRT have.
    """

    def __init__(
        self, model: nn.Module, captured: Mapping[str, Captured], batch: int, portable: bool
    ) -> None:
        self.model, self.captured, self.batch, self.portable = model, captured, batch, portable
        prompt, token = captured["prefill"], captured["decode"]
        if [s.plan for s in token.sites] != [s.plan for s in prompt.sites]:
            raise ExportError(
                f"{type(model).__name__}: its prompt and its steps do not cache the same layers"
            )
        self.groups = self._groups(PortablePlan if portable else ExportPlan)
        self.least = max(site.plan.window for site in prompt.sites) + 1
        self.bound = prompt.bound

    @cached_property
    def prefill(self) -> Graph:
        """The prompt's graph."""
        return self._prefill(self.groups, 0)

    @cached_property
    def decode(self) -> Graph:
        """The decoded token's."""
        return self._decode(self.groups, "export")

    @property
    def graphs(self) -> list[Graph]:
        """Both."""
        return [self.prefill, self.decode]

    def engine(self, name: str) -> Graph:
        """A graph, "prefill" or "decode", for compilers that fuse sums with the decoding of what is
        summed: products of matrices over the state are spelled out, and nothing is bytes. Nor do
        they sort more than ``MOST_SORTED`` at once.
        """
        if name == "decode":
            return self._decode(self.engine_groups, "export_sums", engine=True)
        return self._prefill(self.engine_groups, MOST_SORTED)

    @cached_property
    def engine_groups(self) -> list[Group]:
        """The state as those graphs take it."""
        return self._groups(ExportPlan)

    def span(self, longest: int | None, config: Mapping[str, Any]) -> tuple[int, int]:
        """The fewest and the most tokens of prompts of engines, which must know both.

        Args:
            longest: the most; None for all that ``config``, the sidecar's, speaks of, or for what
                the model has positions for.

        Raises:
            ExportError: if it is less than the fewest, or more than the model can tell apart.
        """
        if longest is None:
            known = self.bound or getattr(text_config(self.model), "max_position_embeddings", None)
            spoken = ArkvConfig.make(config).most_tokens
            longest = max(self.least, min(spoken, known or spoken))
        if longest < self.least:
            raise ExportError(f"longest={longest}: the prompt's graph takes {self.least} or more")
        if self.bound and longest > self.bound:
            raise ExportError(f"longest={longest}: the model has positions for {self.bound} only")
        return self.least, longest

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        (output,) = self.decode.program.graph.find_nodes(op="output")
        return int(output.args[0][0].meta["val"].shape[-1])

    def _groups(self, kind: type[ExportPlan]) -> list[Group]:
        sites = self.captured["prefill"].sites
        return group_layers([kind.of(s.plan, s.site.name) for s in sites], self.batch)

    def _ids(self, tokens: int) -> Tensor:
        device = next(self.model.parameters()).device
        return torch.zeros(self.batch, tokens, dtype=torch.long, device=device)

    def _prefill(self, groups: list[Group], most_sorted: int) -> Graph:
        ids = self._ids(self.least + PROMPT)
        places = torch.arange(ids.shape[1], device=ids.device)
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": places.expand_as(ids).contiguous(),
        }
        captured = self.captured["prefill"]
        given = {name: given[name] for name in captured.arguments}
        free = {name: {1: Dim(TOKENS, min=self.least)} for name in given}
        step = Step(self.model, captured, groups, True, engine=bool(most_sorted))
        return _graph("prefill", step, given, free, most_sorted)

    def _decode(self, groups: list[Group], kernel: str, engine: bool = False) -> Graph:
        given = {"input_ids": self._ids(1), "position_ids": self._ids(1)}
        for group in groups:
            tensors = (x.to(given["input_ids"].device) for x in group.empty())
            given.update(zip(group.names(PAST), tensors, strict=True))
        step = Step(self.model, self.captured["decode"], groups, False, kernel, engine)
        return _graph("decode", step, given, None)


def make_programs(
    model: nn.Module, config: ArkvConfig, calibration: Calibration | None, batch: int,
    insert_cache: bool = False, portable: bool = False,
) -> Programs:  # fmt: skip
    """Capture, and give the state names; the model is left as it was.

    Raises:
        ExportError: if anything would be lost.
    """
    own = capture if cached_layers(model) else capture_absorbed
    front = capture_inserted if insert_cache else own
    prompt, token = front(model, config, calibration, batch)
    return Programs(model, {"prefill": prompt, "decode": token}, batch, portable)


@contextmanager
def _plain_min() -> Generator[None]:
    """Within it torch's own rules for views compare two strides by Python's ``min``.

    The export puts a symbolic one in its place everywhere. Before torch 2.13 that does not see that
    8 T is less than 16 T, and dimensions with a free T below them could not be flattened.
    """
    with patch.object(torch._prims, "min", min, create=True):
        yield


def _graph(
    name: str, step: Step, inputs: dict[str, Tensor], free: dict[str, Any] | None,
    most_sorted: int = 0,
) -> Graph:  # fmt: skip
    step.eval()
    outputs = ["logits", *(name for group in step.groups for name in group.names(PRESENT))]
    shapes = (tuple(free[n] for n in inputs),) if free else None
    try:
        with torch.no_grad(), _plain_min(), traced_to_leave(most_sorted):
            program = torch.export.export(
                step, tuple(inputs.values()), dynamic_shapes=shapes, strict=False
            )
    except torch._dynamo.exc.UserError as error:
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        raise ExportError(
            f"the {name} graph does not serve prompts of every length: {' '.join(lines[1:3])}"
        ) from error
    return Graph(name, program, inputs, outputs, step.weights)
