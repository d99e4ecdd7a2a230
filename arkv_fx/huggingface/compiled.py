"""A model's forward behind Dynamo: its limits, its hooks, and what its errors mean."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules import module as modules

from arkv_fx.calibration import Calibration
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.compile.weight_guards import lean_guards
from arkv_fx.errors import ArkvError, TransformError

# Each batch size, a mask or none, one token or many: a model in real use needs more graphs than
# Dynamo's default allows, and falling back to eager would leave the cache behind.
RECOMPILE_LIMIT = 64
# Hooks for all modules at once, which Dynamo does not guard for as long as there are none.
HOOKS: tuple[dict[int, Any], ...] = (
    modules._global_forward_pre_hooks, modules._global_forward_hooks,
    modules._global_backward_pre_hooks, modules._global_backward_hooks,
)  # fmt: skip


class CompiledForward:
    """``forward`` compiled by ``backend``, once for each kind of call.

    Args:
        forward: bound, as the model had it.
        backend: what compiles its graphs.
        name: what errors call the model.
        options: of ``torch.compile``.
    """

    def __init__(
        self, forward: Callable[..., Any], backend: ArkvBackend, name: str, **options: Any
    ) -> None:
        self.forward, self.backend, self.name, self.options = forward, backend, name, options
        self.kinds: dict[tuple[bool, ...], Callable[..., Any]] = {}

    @property
    def calibration(self) -> Calibration | None:
        """That of its plans."""
        return self.backend.calibration

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` answers.

        Raises:
            TransformError: if it has been compiled too often.
            ArkvError: whatever the backend raised.
        """
        limits = {
            "recompile_limit": RECOMPILE_LIMIT,
            "accumulated_recompile_limit": 8 * RECOMPILE_LIMIT,
            "fail_on_recompile_limit_hit": True,
            "specialize_float": True,  # scales are constants of a layer
            "skip_nnmodule_hook_guards": False,  # a hook that comes later is to run, too
        }
        kind = tuple(map(bool, HOOKS))
        if kind not in self.kinds:
            self.kinds[kind] = self._compiled()
        try:
            with torch._dynamo.config.patch(limits):
                return self.kinds[kind](*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise TransformError(
                f"{self.name} has been compiled {RECOMPILE_LIMIT} times: each batch size costs a "
                "graph for prompts and one for steps. Call with few batch sizes (pad a batch to "
                "the next power of two), or begin again with torch._dynamo.reset()"
            ) from error
        except torch._dynamo.exc.BackendCompilerFailed as error:
            inner = error.inner_exception
            if isinstance(inner, ArkvError):
                raise inner from None
            raise

    def _compiled(self) -> Callable[..., Any]:
        # Code that several of these run (behind a graph break) has graphs of each backend apart.
        def backend(*args: Any, **kwargs: Any) -> Any:
            return self.backend(*args, **kwargs)

        run: Callable[..., Any] = torch.compile(
            own_code(self.forward), backend=backend, **self.options,
            options={"guard_filter_fn": lean_guards},  # of this call: torch takes it out
        )  # fmt: skip
        return run


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` behind a code object of its own.

    Dynamo counts recompilations per code object, and all transformers models share one: a second
    model would eat the first one's limit.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return types.FunctionType(
        entry.__code__.replace(co_name="arkv_forward"),
        entry.__globals__,
        closure=entry.__closure__,
    )
