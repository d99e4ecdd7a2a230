"""A cache for models that know none: ``transform(model, config, insert_cache=True)``.

The model's forward is captured once with a varying number of tokens. Each causal self-attention
then attends over a state of ours and the new tokens, and positions go on from where the last call
stopped. Whether that is the same model is tried before anything is answered.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from arkv_fx.calibration import Calibration
from arkv_fx.compile.backend import LOWERINGS
from arkv_fx.compile.pieces import slower_kernels
from arkv_fx.compile.replay import notes
from arkv_fx.compile.uncompiled import UNCOMPILED
from arkv_fx.config import ArkvConfig
from arkv_fx.costs.waiting import Waiting
from arkv_fx.errors import CacheError, CalibrationError, TransformError, UnknownOptionError
from arkv_fx.huggingface import first_prompt
from arkv_fx.huggingface.bound import Bound
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.insert.program import Program, build
from arkv_fx.insert.self_check import ROOMY, SAMPLE, self_check, stretched
from arkv_fx.insert.tracing import Captured, capture
from arkv_fx.logs import get_logger
from arkv_fx.report import Report

log = get_logger("calibration")
FEWEST_COLUMNS = 256
"""Room for so many tokens in a bias by position, at first."""


class Programs(dict[tuple[int, bool, bool, int], Program]):
    """Programs under one calibration: a cache goes on with those that it began with."""

    def __init__(self, calibration: Calibration | None) -> None:
        super().__init__()
        self.calibration = calibration


class Inserted(Bound):
    """What ``model.arkv`` is for a model into which a cache was inserted."""

    def __init__(
        self,
        model: nn.Module,
        config: ArkvConfig,
        calibration: Calibration | None,
        compile: str,
        sample: tuple[Any, ...] | None,
        learns: bool = False,
    ) -> None:
        self.name = f"{type(model).__name__}#{id(model):x}"
        self.model, self.config, self.lowering = model, config, compile
        self.learns = learns  # from the first long prompt
        self.original: Callable[..., Any] = model.forward
        self.replaced = {"forward": self.original} if "forward" in model.__dict__ else {}
        # Each with the symbol of its number of tokens, and whether it has biases by position.
        self.captured: list[tuple[Captured, Any, bool]] = []
        self.programs = Programs(calibration)
        self.lock = threading.RLock()  # of whoever captures or compiles
        self.parts: list[Any] = []
        if sample is not None:
            self._capture(*tree_flatten((sample, {})))

    @property
    def calibration(self) -> Calibration | None:
        """That of sequences that begin."""
        return self.programs.calibration

    def under(self, calibration: Calibration | None) -> Programs:
        """Programs for sequences whose plans are by ``calibration``."""
        return self.programs if calibration == self.calibration else Programs(calibration)

    def report(self) -> Report:
        """Every attention site seen so far: fused or not and why, slots and bytes."""
        found = [p.sites for p in self.programs.values()]
        found += [
            self._program(self.programs, i, True, False, 0).sites for i in range(len(self.captured))
        ]
        replays = [p.replay for p in self.programs.values() if p.replay is not None]
        said = notes(replays)
        if self.lowering != "reference":
            said += slower_kernels(chain(*found), self.lowering not in UNCOMPILED)
        return Report.of(found, self.config, said)

    def run(self, *args: Any, cache: ArkvCache | None = None, **kwargs: Any) -> Any:
        """The full forward, or with a cache its answer for the new tokens alone."""
        if cache is None:
            return self.original(*args, **kwargs)
        self._check(cache)
        with cache.turn():
            return self._step(cache, args, kwargs)

    def _step(self, cache: ArkvCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        # Compiled graphs take the strides that they were traced with.
        leaves = [x.contiguous() if isinstance(x, Tensor) else x for x in leaves]
        with self.lock:
            index = self._find(leaves, spec)
        graph, tokens, _ = self.captured[index]
        length = _token_count(graph, tokens, leaves)
        bound = graph.bounds.get(tokens)
        if bound is not None and cache.seen + length > bound:
            raise CacheError(
                f"the cache holds {cache.seen} tokens and {length} more came, but {self.name} "
                f"knows positions for {bound} only (its tables or an assertion end there)"
            )
        inputs, out = graph.inputs(leaves), None
        ids = _ids(graph, tokens, leaves)
        with self.lock:
            known = self.programs.calibration
            if self.learns and first_prompt.begins(self.config, cache, ids, known=known):
                out = self._learn(graph, inputs, cache, length)
                self.learns = out is not None and first_prompt.unsettled(self.calibration)
        if cache.seen == 0 or cache.compiled is None:
            cache.compiled = self.programs
        cache.session.tokens = -1  # in doubt until the whole step is done
        if out is None:
            after = cache.seen + length
            with self.lock:
                program = self._program(cache.compiled, index, cache.seen == 0, length == 1, after)
            out = program(inputs, cache.session, cache.seen)
        cache.seen += length
        cache.session.tokens = cache.seen
        return graph.output(out)

    def _check(self, cache: Any) -> None:
        if not isinstance(cache, ArkvCache):
            raise CacheError(
                f"cache is a {type(cache).__name__}; pass arkv_fx.ArkvCache(model), or no cache "
                "for the full forward"
            )
        cache.require(self)
        if self.model.training:
            raise CacheError("the cache is not differentiated: call model.eval() or pass no cache")
        if self.captured and _parts(self.model) != self.parts:
            raise TransformError(
                f"{self.name}: its modules or their hooks are not those that it had when its cache "
                "was inserted, and what was captured then knows nothing of them: call "
                "arkv_fx.restore(model) and transform it again. (A hook that takes something down "
                "runs without cache= only)"
            )

    def _find(self, leaves: list[Any], spec: TreeSpec) -> int:
        """The graph for a call, captured if it is the first of its kind."""
        for index, (graph, tokens, _) in enumerate(self.captured):
            if graph.fits(leaves, spec, tokens):
                return index
        for graph, tokens, _ in self.captured:
            if graph.in_spec == spec:  # a graph of one token would say nothing about positions
                leaves = stretched(leaves, graph.token_dims(tokens))
                break
        self._capture(leaves, spec)
        return len(self.captured) - 1

    def _capture(self, leaves: list[Any], spec: TreeSpec) -> None:
        args, kwargs = tree_unflatten(leaves, spec)
        if self.model.training:
            raise TransformError("call model.eval() first: a cache is for inference")
        graph = capture(self.model, self.original, args, kwargs)
        self.parts = _parts(self.model)
        first = build(graph, ROOMY, None, "reference", fresh=True)
        later = build(graph, ROOMY, None, "reference", fresh=False, columns=2 * SAMPLE)
        self_check(self.name, self.original, graph, (first, later), leaves)
        self.captured.append((graph, first.tokens, first.biased))

    def _learn(self, graph: Captured, inputs: list[Any], cache: ArkvCache, length: int) -> Any:
        """The answer to a prompt that calibrates; None if it cannot, which is logged."""
        waiting = Waiting(self.config)
        try:
            program = build(graph, self.config, None, "eager", fresh=True, stand_in=waiting.attend)
            out = program(inputs, cache.session, 0)
            self.programs = Programs(first_prompt.concluded(waiting, cache, self.model, length))
        except CalibrationError as error:
            log.info("%s is not calibrated on its first prompt: %s", self.name, error)
            cache.reset()
            return None
        return out

    def _program(
        self, programs: Programs, index: int, fresh: bool, one: bool, total: int
    ) -> Program:
        graph, tokens, biased = self.captured[index]
        columns = 0
        if biased and not fresh:  # one more program each time that the text has doubled
            columns = max(FEWEST_COLUMNS, 1 << (total - 1).bit_length())
            columns += columns == graph.traced(tokens)  # equal extents would be taken for the same
        # What is run as it is does not care whether one token comes or many.
        key = (index, fresh, one and self.lowering not in UNCOMPILED, columns)
        if key not in programs:
            programs[key] = build(
                graph, self.config, programs.calibration, self.lowering,
                fresh=fresh, one=key[2], columns=columns,
            )  # fmt: skip
        return programs[key]


def insert(
    model: nn.Module,
    config: ArkvConfig,
    calibration: Calibration | None,
    compile: str,
    sample: Any,
    learns: bool = False,
) -> nn.Module:
    """``transform(model, ..., insert_cache=True)``; see there."""
    if compile not in LOWERINGS:
        raise UnknownOptionError(f"compile={compile!r}: choose one of {list(LOWERINGS)}")
    if "cache" in inspect.signature(model.forward).parameters:
        raise TransformError(
            f"{type(model).__name__}.forward has an argument `cache` of its own: it is not "
            "cache-less, and insert_cache needs the name; use transform without insert_cache"
        )
    if sample is None:
        sample = _random_sample(model)
    elif not isinstance(sample, tuple):
        sample = (sample,)
    state = Inserted(model, config, calibration, compile, sample, learns)
    # An outer torch.compile stops here.
    run: Callable[..., Any] = torch._dynamo.disable(state.run)

    @functools.wraps(state.original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs) if "cache" in kwargs else state.original(*args, **kwargs)

    model.arkv = state  # type: ignore[assignment]
    model.forward = forward
    return model


def _random_sample(model: nn.Module) -> tuple[Any, ...] | None:
    """Arguments for a model whose forward needs only one: token ids."""
    needed = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    ids = random_ids(model)
    return (ids,) if len(needed) == 1 and ids is not None else None


def random_ids(model: nn.Module, batch: int = 1) -> Tensor | None:
    """Token ids [batch, SAMPLE] that every embedding of the model knows; None if it has none."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    if not tables:
        return None
    generator = torch.Generator().manual_seed(0)
    most = min(t.shape[0] for t in tables)
    return torch.randint(0, most, (batch, SAMPLE), generator=generator).to(tables[0].device)


def _parts(model: nn.Module) -> list[Any]:
    """Every module, by its place, and its hooks."""
    return [
        (name, id(module), *module._forward_pre_hooks, *module._forward_hooks)
        for name, module in model.named_modules()
    ]


def _ids(graph: Captured, tokens: Any, leaves: Sequence[Any]) -> Tensor | None:
    """The token ids [B, T] among the arguments; None if the model takes embeddings."""
    for leaf, dims in graph.token_dims(tokens).items():
        x = leaves[leaf]
        if dims[0] == 1 and x.dim() == 2 and not x.is_floating_point():
            return x  # type: ignore[no-any-return]
    return None


def _token_count(graph: Captured, tokens: Any, leaves: Sequence[Any]) -> int:
    leaf, dims = next(iter(graph.token_dims(tokens).items()))
    return int(leaves[leaf].shape[dims[0]])
