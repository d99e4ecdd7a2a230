"""Compile a rewritten graph in pieces: one compilation for all layers of one shape.

The graph is cut at its attention operators. What lies between two of them is the same for most
layers of a model but for the weights, which are inputs, so it is compiled once and called for
each; so is the attention of one decoded token, once per plan. A flat graph of 30 layers takes
Inductor minutes. The idea is that of vLLM's piecewise compilation.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import is_autocast_available
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.split_module import split_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

import arkv_fx.ops.schema  # noqa: F401  (registers the operators)
from arkv_fx.compile.fast_linear import fast_products
from arkv_fx.compile.uncompiled import ATTENTIONS
from arkv_fx.compile.unwrapped import unwrap
from arkv_fx.compile.weight_guards import tensor_form
from arkv_fx.formats import FORMATS
from arkv_fx.kernels import KERNELS, get_direct_step, missing_forms, usable
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import peek
from arkv_fx.ops.signatures import AttendArguments
from arkv_fx.passes.nodes import example
from arkv_fx.passes.sites import Site
from arkv_fx.registry import forget_with
from arkv_fx.scores import SCORES
from arkv_fx.state.journal import current

Compiled = Callable[..., Any]
ATTEND = torch.ops.arkv.attend.default

# Moving a tensor's reads behind its update makes Inductor copy the tensor: all of a tier's codes.
# A product and its sum are one instruction, with one rounding, where the compiler may join them.
SETTINGS = {"reorder_for_locality": False, "cpp.enable_floating_point_contract_flag": "fast"}
# Pieces without symbolic sizes, whatever graph, model or calibration they come from.
compiled_pieces: dict[Any, Compiled] = {}
forget_with(compiled_pieces.clear)


@lru_cache(maxsize=1)
def _sources() -> str:
    """A digest of this package: graphs hold only the names of our operators, not what they do."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _strangers() -> str:
    """The same of what others have added to the registries; what has no file is never the same."""
    classes = [type(codec) for fmt in FORMATS.values() for codec in fmt.codecs]
    classes = [c for cls in (*classes, *SCORES.values()) for c in cls.__mro__ if c is not object]
    functions: list[Any] = []
    for kernel in KERNELS.values():
        functions += [kernel.attend, kernel.encode]
        functions += [kernel.writer.take, kernel.writer.store] if kernel.writer else []
        functions += [kernel.step.traced, kernel.step.direct] if kernel.step else []
    digest = sha256()
    for thing in (*classes, *filter(None, functions)):
        inner: Any = inspect.unwrap(getattr(thing, "func", thing))  # of a partial function
        if inner.__module__.split(".")[0] not in (__name__.split(".")[0], "abc"):
            try:
                digest.update(Path(inspect.getfile(inner)).read_bytes())
            except (OSError, TypeError):
                digest.update(uuid4().bytes)
    return digest.hexdigest()


def compile_graph(graph: GraphModule, inputs: list[Any]) -> Compiled:
    """Inductor on the whole graph; its cache gives nothing that another arkv_fx compiled."""
    tag = torch.compiler.config.cache_key_tag + _sources() + _strangers()
    settings = torch._inductor.config.patch(SETTINGS)
    with settings, torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled: Compiled = compile_fx(graph, inputs)  # type: ignore[assignment]
    return compiled


def compile_pieces(graph: GraphModule, inputs: list[Any], probe: Any = None) -> Compiled:
    """Inductor on the pieces of a rewritten graph; takes and gives what the graph does.

    A prompt's attention is left to torch, all but the codes: it comes once, and is bound by its
    matrix products. ``probe`` is Python that the graph calls: it is called, with real tensors only.
    """
    fast_products(graph)
    taken = unwrap(graph)
    if taken is not None:
        inputs = taken(inputs)
    part = 0
    parts: dict[Node, int] = {}
    for node in graph.graph.nodes:
        if node.target in ATTENTIONS or (probe is not None and node.target == probe):
            parts[node] = part + 1
            part += 2
        else:
            parts[node] = part
    split = split_module(graph, graph, parts.__getitem__, keep_original_order=True)
    # Dynamo's inputs are real tensors of this call; which of their sizes are symbols, its graph
    # knows. Inputs that were added are fakes themselves.
    traced = [example(node) for node in graph.graph.find_nodes(op="placeholder")]
    known = [x if fake is None else fake for fake, x in zip(traced, inputs, strict=True)]
    mode = detect_fake_mode(inputs) or FakeTensorMode()
    fakes = [_fake(mode, x) for x in known]
    # Dispatched in Python, as Dynamo does it: some operators in C++ (before torch 2.13 a matrix
    # product of vectors) would take the sizes of this prompt for those of all.
    with mode, enable_python_dispatcher():
        _Pieces(split, probe).run(*fakes)
    forward: Compiled = split.forward
    return forward if taken is None else lambda *given: forward(*taken(given))


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    """``value`` as a fake tensor of ``mode``; Dynamo traces in one mode and compiles in another."""
    if not isinstance(value, Tensor):
        return value
    if is_traceable_wrapper_subclass(value):  # quantized weights, parts of a weight on many devices
        return transform_subclass(value, lambda _, inner: _fake(mode, inner))
    if isinstance(value, FakeTensor) and value.fake_mode is mode:
        return value
    with mode:
        twin = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
    return twin.requires_grad_(value.requires_grad)


class _Pieces(Interpreter):
    """Runs the graph of pieces on fake tensors and puts a compiled piece in place of each."""

    def __init__(self, split: GraphModule, probe: Any) -> None:
        super().__init__(split)
        self.split, self.probe = split, probe
        self.local: dict[Any, Compiled] = {}
        self.outputs: dict[Any, Any] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        piece = getattr(self.split, target)
        if any(n.op == "call_function" and n.target == self.probe for n in piece.graph.nodes):
            return None
        key = piece_key(piece, args)
        attend = next((n for n in piece.graph.nodes if n.target in ATTENTIONS), None)
        if key not in self.outputs:
            self.outputs[key] = (
                super().call_module(target, args, kwargs)
                if attend is None
                else _output(attend, args)
            )
        out = self.outputs[key]
        # Sizes that are symbols mean something in this graph only.
        known = self.local if any(not _is_static(a) for a in args) else compiled_pieces
        one = False
        if attend is not None:
            given: AttendArguments[Node] = AttendArguments.of(attend)
            kernel = usable(out.device, given.layer_plan)[0]
            one = out.shape[2] == 1
            step = _whole_step(attend, kernel) if one else None
            if step is not None:
                self._put(target, _recordable(piece, kernel, step))
                return out
            replace(given, kernel=kernel).write(attend)
            key = (key, kernel)
            if not one:
                known = self.local
        if key not in known:
            piece.recompile()
            if attend is None:
                known[key] = compile_graph(piece, list(args))
            elif not one:
                known[key] = _laid_out(piece.forward, out)
            else:
                same = GraphModule(piece, copy.deepcopy(piece.graph))
                compiled = compile_graph(piece, list(args))
                known[key] = _recordable(same, "reference", compiled)
        self._put(target, known[key])
        return out

    def _put(self, target: str, function: Compiled) -> None:
        """Replace a piece by a function: a module's call costs more."""
        delattr(self.split, target)
        object.__setattr__(self.split, target, function)


def _output(attend: Node, args: tuple[Any, ...]) -> Any:
    """What a piece that attends gives for fakes: what it does to the state has no part in it."""
    values = dict(zip(attend.graph.find_nodes(op="placeholder"), args, strict=True))
    given: AttendArguments[Tensor] = AttendArguments.of(attend, values.__getitem__)
    return given.run(peek)


def _whole_step(attend: Node, kernel: str) -> Compiled | None:
    """The decode step as one call where the kernel does all of it: there is nothing to compile."""
    given: AttendArguments[Node] = AttendArguments.of(attend)
    step = get_direct_step(kernel, given.layer_plan)
    if step is None or attend.target != ATTEND or given.computed:
        return None
    order = {n: i for i, n in enumerate(attend.graph.find_nodes(op="placeholder"))}
    first = [order[n] for n in (given.q, given.k, given.v)]
    held = [order[n] for n in given.state]
    masked, sunk = (None if n is None else order[n] for n in (given.mask, given.sink_logits))
    knobs = Knobs(given.scale, given.softcap)

    def run(*args: Tensor) -> Tensor:
        q, k, v = (args[i] for i in first)
        here = knobs if sunk is None else replace(knobs, sink_logits=args[sunk])
        seen = None if masked is None else args[masked]
        return step(q, k, v, seen, [args[i] for i in held], here)

    return run


def _laid_out(attend: Compiled, fake: Tensor) -> Compiled:
    """``attend``, its result in memory as that of ``fake``: compiled pieces rely on it.

    How many tokens come decides how they are attended to, and that how the result lies.
    """
    strides = [s.node.hint if isinstance(s, torch.SymInt) else s for s in fake.stride()]
    order = sorted(range(fake.dim()), key=strides.__getitem__, reverse=True)
    back = sorted(range(fake.dim()), key=order.__getitem__)

    def run(*args: Tensor) -> Tensor:
        out: Tensor = attend(*args)
        return out.permute(order).contiguous().permute(back)

    return run


def _recordable(piece: GraphModule, kernel: str, compiled: Compiled) -> Compiled:
    """``compiled``, but the operator itself while steps are written down, see ``ops.recorded``."""
    plain: list[Compiled] = []

    def run(*args: Tensor) -> Any:
        if current() is None:
            return compiled(*args)
        if not plain:
            for node in piece.graph.find_nodes(op="call_function", target=ATTEND):
                given: AttendArguments[Node] = AttendArguments.of(node)
                replace(given, kernel=kernel).write(node)
            piece.recompile()
            plain.append(piece.forward)
        return plain[0](*args)

    return run


def slower_kernels(sites: Iterable[Site], compiled: bool) -> list[str]:
    """Which layers' formats keep them from the fastest kernel of their device, for the report."""
    found = [
        missing_forms(site.planned.device, site.planned.plan, compiled)
        for site in sites
        if site.fused and site.planned is not None
    ]
    return sorted({note for notes in found for note in notes})


def _is_static(value: Any) -> bool:
    if isinstance(value, torch.SymInt):
        return False
    return not isinstance(value, Tensor) or all(
        isinstance(s, int) for s in (*value.shape, *value.stride())
    )


def piece_key(piece: GraphModule, args: tuple[Any, ...]) -> Any:
    """Equal for pieces that compile to the same: the operations and the shapes of the inputs."""
    order: dict[Node, int] = {}
    lines: list[Any] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return ("node", order[value])
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, *map(plain, value))
        if isinstance(value, Mapping):
            return tuple((k, plain(v)) for k, v in value.items())
        if isinstance(value, slice):
            return ("slice", plain(value.start), plain(value.stop), plain(value.step))
        if isinstance(value, torch.SymInt):
            return ("symbol", str(value))
        return (type(value).__name__, value)

    for node in piece.graph.nodes:
        order[node] = len(order)
        if node.op == "get_attr":  # a constant of this piece alone
            lines.append((node.op, id(getattr(piece, node.target, node))))
        elif node.op == "placeholder":
            lines.append(node.op)
        else:
            lines.append((node.op, node.target, plain(node.args), plain(node.kwargs)))
    shapes = tuple(tensor_form(a) if isinstance(a, Tensor) else plain(a) for a in args)
    # Autocast is a part of what is compiled.
    kinds = sorted({a.device.type for a in args if isinstance(a, Tensor)})
    lowered = [
        torch.get_autocast_dtype(kind)
        for kind in kinds
        if is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    ]
    modes = torch.is_grad_enabled(), torch.get_num_threads(), tuple(lowered)
    return tuple(lines), shapes, modes
