"""Decode steps that are recorded once and launched as one: CUDA graphs.

A decoded token is hundreds of kernels of a few microseconds each, and launching them one by one
takes longer than they run. A recording runs them all over the same memory: the state never moves,
and what is new in a step is copied to where the recording reads it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from arkv_fx.compile.replay_inputs import Kind, kinds, why_not
from arkv_fx.passes.nodes import shape
from arkv_fx.state.journal import current
from arkv_fx.state.session import LayerState

Call = Callable[[], Any]
Recorder = Callable[[Call, torch.device], tuple[Any, Callable[[], None]]]


def record_cuda(call: Call, device: torch.device) -> tuple[Any, Callable[[], None]]:
    """The outputs of ``call``, which nothing has computed yet, and what computes them."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on allocating meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = call()
    return out, graph.replay


RECORDERS: dict[str, Recorder] = {"cuda": record_cuda}
"""By the type of the device; on all others steps are called as they are."""


@dataclass
class Recording:
    """One decode step over one state.

    ``key`` must be the same for it to be used again; ``inputs`` are what it reads, ``weights`` the
    addresses of the model's tensors among them, ``homes`` the state tensors of each layer, and
    ``owners`` whose they are.
    """

    key: Any
    inputs: list[Any]
    weights: list[int]
    homes: list[list[Tensor]]
    owners: list[ref[LayerState]]
    outputs: Any
    launch: Callable[[], None]

    def is_of(self, states: Sequence[LayerState]) -> bool:
        """Whether it was made for the sequence with these states, wherever they are now."""
        return all(owner() is state for owner, state in zip(self.owners, states, strict=True))

    @property
    def idle(self) -> bool:
        """Whether no living sequence uses its memory."""
        pairs = zip(self.owners, self.homes, strict=True)
        return all((o := owner()) is None or o.tensors is not home for owner, home in pairs)

    def adopt(self, states: Sequence[LayerState]) -> None:
        """Move a sequence into the recording's memory."""
        for state, home in zip(states, self.homes, strict=True):
            if state.tensors is not home:
                torch._foreach_copy_(home, state.tensors)
                state.tensors = home
        self.owners = [ref(state) for state in states]

    def take(self, new: Sequence[int], inputs: Sequence[Any]) -> None:
        """Copy the ``new`` ones of the inputs to where they are read."""
        for i in new:
            self.inputs[i].copy_(inputs[i])


class Replay:
    """A compiled decode graph that is recorded when it is called for the second time.

    The first call runs it as it is: kernels are compiled and libraries get their workspace, which
    must not happen in a recording. Each sequence that decodes at the same time has a recording of
    its own; one that ends leaves its to the next, which moves into its memory.
    """

    def __init__(
        self, compiled: Callable[..., Any], graph: GraphModule, weights: Collection[str] = ()
    ) -> None:
        inputs = kinds(graph, weights)
        self.compiled, self.kinds = compiled, [*inputs.values()]
        self.weights = [i for i, kind in enumerate(self.kinds) if kind is Kind.WEIGHT]
        self.given = {
            i: node.name for i, (node, kind) in enumerate(inputs.items()) if kind is Kind.GIVEN
        }
        self.tensors = [
            i for i, node in enumerate(inputs) if i in self.given and shape(node) is not None
        ]
        self.reason = why_not(graph, inputs)
        """Why steps are not recorded, "" if they are."""
        self.replayed = 0
        """Steps that were replayed."""
        self.recordings: list[Recording] = []
        self.last: tuple[list[ref[LayerState]], Any] | None = None
        self.warm: set[Any] = set()

    def __call__(self, inputs: Sequence[Any], states: Sequence[LayerState]) -> Any:
        """The graph's outputs; ``inputs`` hold the tensors of ``states``, too."""
        devices = {state["count"].device for state in states}
        device = next(iter(devices))
        inputs = [*inputs]
        for i in self.tensors:
            if isinstance(inputs[i], int):  # see `numbers_as_tensors`
                inputs[i] = torch.full((), inputs[i], device=device)
        record = RECORDERS.get(device.type)
        if record is None:
            self.reason = f"there are no graphs to record on {device.type}"
        if record is None or self.reason or current() is not None:
            return self.compiled(*inputs)
        if len(devices) > 1:
            return self._give_up("its layers are on several devices", inputs)
        key = self._key(inputs, states, device)
        if (changed := self._changed(key, states)) is not None:
            return self._give_up(f"{changed} changes from step to step", inputs)
        if key not in self.warm:
            self.warm.add(key)
            return self.compiled(*inputs)
        recording = self._find(key, inputs, states)
        if recording is None:
            try:
                recording = self._record(record, device, key, inputs, states)
            except RuntimeError as error:  # nothing has been computed, so nothing is lost
                return self._give_up(f"recording failed: {error}", inputs)
            self.recordings.append(recording)
        recording.adopt(states)
        recording.take(self.tensors, inputs)
        recording.launch()
        self.replayed += 1
        # The recording's own outputs are overwritten by the next step.
        return tree_map_only(Tensor, Tensor.clone, recording.outputs)

    def _key(
        self, inputs: Sequence[Any], states: Sequence[LayerState], device: torch.device
    ) -> tuple[Any, ...]:
        """What must be the same for a recording to be used again, by input."""
        used = [_look(inputs[i], device) for i in self.given]
        return (*used, tuple(state.batch for state in states))

    def _changed(self, key: Any, states: Sequence[LayerState]) -> str | None:
        """What has changed since the last step of the same sequence, if it was the last one."""
        before, self.last = self.last, ([ref(state) for state in states], key)
        if before is None or any(o() is not s for o, s in zip(before[0], states, strict=True)):
            return None
        *old, old_batch = before[1]
        *new, batch = key
        if old_batch != batch:
            return None
        pairs = zip(self.given.values(), old, new, strict=True)
        return next((name for name, a, b in pairs if a != b), None)

    def _give_up(self, reason: str, inputs: Sequence[Any]) -> Any:
        self.reason = reason
        self.recordings.clear()
        warnings.warn(notes([self])[0], RuntimeWarning, 3)
        return self.compiled(*inputs)

    def _find(
        self, key: Any, inputs: Sequence[Any], states: Sequence[LayerState]
    ) -> Recording | None:
        """The sequence's own recording, or one that nobody uses; at most one such is kept."""
        weights = self._weights(inputs)
        known = [r for r in self.recordings if r.weights == weights]
        same = [r for r in known if r.key == key]
        found = next((r for r in same if r.is_of(states)), None)
        found = found or next((r for r in same if r.idle), None)
        self.recordings = [r for r in known if r is found or not r.idle]
        return found

    def _weights(self, inputs: Sequence[Any]) -> list[int]:
        return [inputs[i].data_ptr() for i in self.weights]

    def _record(
        self, record: Recorder, device: torch.device, key: Any, inputs: Sequence[Any],
        states: Sequence[LayerState],
    ) -> Recording:  # fmt: skip
        # Made under inference_mode they could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            held = [_held(kind, x) for kind, x in zip(self.kinds, inputs, strict=True)]
            outputs, launch = record(lambda: self.compiled(*held), device)
        homes = [state.tensors for state in states]
        owners = [ref(state) for state in states]
        return Recording(key, held, self._weights(inputs), homes, owners, outputs, launch)


def notes(replays: Iterable[Replay]) -> list[str]:
    """Why steps are not replayed, for each that gave up."""
    return [
        f"decode steps are not replayed from a recording: {r.reason}" for r in replays if r.reason
    ]


def _held(kind: Kind, value: Any) -> Any:
    """What a recording reads in place of an input."""
    if not isinstance(value, Tensor):
        return value  # one that the graph does not use may be the stride of a tensor
    if kind is not Kind.GIVEN:
        return None if kind is Kind.UNUSED else value
    strides = value.stride()
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)


def _look(value: Any, device: torch.device) -> Any:
    """What a recording's code depends on: all of a number, of a tensor its form."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value.dtype, tuple(value.shape), value.stride()
        return tuple(value.flatten().tolist())  # read by the host, so its numbers are recorded
    return value
