"""Many caches of one model: traced once, prefilled once, then each decoded by its own method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from arkv_fx.calibration import Calibration, fingerprint
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.compile.pieces import Compiled
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ConfigError
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.layers import positions_to_come
from arkv_fx.huggingface.transformed import Transformed
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.ops.no_output import NoOutput
from arkv_fx.plan import LayerPlan, plan_calibrated
from arkv_fx.state.session import check_finite
from arkv_fx.transforming import restore, transform


class Contest:
    """One model under several configurations, as a context manager that restores the model.

    Dynamo traces the model once; every method rewrites the captured graph with the ordinary
    passes. One method prefills in the ordinary way, and a probe on each attention gives the
    same queries, keys and values to the states of the others, so every cache holds exactly what
    its own prefill would have put there.

    Args:
        model: a model that is not transformed.
        configs: configuration of each method by name.
        calibrations: calibration of each method by name; none where one is missing.
        compile: "eager" or "inductor", as for ``arkv_fx.transform``.

    Raises:
        ConfigError: if there is no method, or a budget does not hold the window and the sinks.
        TransformError: if the model is transformed already.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Mapping[str, ArkvConfig],
        calibrations: Mapping[str, Calibration | None] | None = None,
        *,
        compile: str = "eager",
    ) -> None:
        if not configs:
            raise ConfigError("no method to compare: name at least one")
        self.model, self.configs, self.calibrations = model, dict(configs), dict(calibrations or {})
        self.active = next(iter(self.configs))
        self._fed: dict[str, ArkvCache] = {}
        for found in self.calibrations.values():
            if found is not None:
                found.check(fingerprint(model))
        transform(model, self.configs[self.active], False, compile=compile)
        self._arkv: Transformed = model.arkv  # type: ignore[assignment]
        self.windows = self._arkv.windows
        self._arkv.compiled = self._arkv.compiled_by(_Switch(self, compile))

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        restore(self.model)

    def prefill(
        self, input_ids: Tensor, methods: Sequence[str] | None = None
    ) -> tuple[Tensor, dict[str, ArkvCache]]:
        """One forward of a prompt that fills the caches of ``methods`` (None: of all).

        Args:
            input_ids: [B, T] int64 without padding, T > 1.

        Returns:
            Logits [B, vocabulary] after the prompt, which no compression has touched, and a cache
            for each method.
        """
        names = list(methods or self.configs)
        caches = {name: ArkvCache(self.model) for name in names}
        self.active = names[0]
        first = caches[self.active]
        self._fed = {name: caches[name] for name in names[1:]}
        try:
            logits = self._forward(input_ids, first)
        finally:
            fed, self._fed = self._fed, {}
        for cache in fed.values():
            cache.seen = cache.session.tokens = first.seen
            # Attention that is not rewritten keeps everything, whatever the method.
            for index, plain in first.session.plain.items():
                cache.session.plain[index] = plain.clone()
        return logits, caches

    def step(self, name: str, input_ids: Tensor, cache: ArkvCache) -> Tensor:
        """Logits [B, vocabulary] after the next tokens ``input_ids`` [B, T] of one method."""
        self.active = name
        return self._forward(input_ids, cache)

    @property
    def graphs(self) -> int:
        """Graphs that were traced so far."""
        return self._arkv.backend.graphs

    def _forward(self, input_ids: Tensor, cache: ArkvCache) -> Tensor:
        out = self.model(
            input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def feed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """The probe: a whole prefill of one layer into the states of the other methods."""
        for name, cache in self._fed.items():
            plan = self._plan(name, layer, k, v)
            state = cache.session.layer(layer, plan, k.shape[0], k.device)
            with NoOutput():
                attend(q, k, v, mask, state.tensors, plan, Knobs(scale), fresh=True)
            check_finite([(layer, state)])

    def _plan(self, name: str, layer: int, k: Tensor, v: Tensor) -> LayerPlan:
        windows = self.windows
        return plan_calibrated(
            self.configs[name],
            self.calibrations.get(name),
            layer,
            windows,
            heads=k.shape[1],
            k_dim=k.shape[-1],
            v_dim=v.shape[-1],
            dtype=k.dtype,
            sliding=windows[layer] if layer < len(windows) else 0,
            positions=positions_to_come(self.model, self.configs[name]),
        )


class _Switch(ArkvBackend):
    """A Dynamo backend that compiles a captured graph for each method when it first runs it."""

    def __init__(self, contest: Contest, compile: str) -> None:
        super().__init__(contest.configs[contest.active], compile=compile)
        self.contest = contest

    def __call__(self, graph: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Compiled:
        self.graphs += 1
        compiled: dict[str, Compiled] = {}
        context = TracingContext.try_get()  # it knows what the graph's symbols mean

        def run(*inputs: Any) -> Any:
            self.calls += 1
            name = self.contest.active
            if name not in compiled:
                backend = ArkvBackend(
                    self.contest.configs[name],
                    self.contest.calibrations.get(name),
                    compile=self.lowering,
                    sliding=self.contest.windows,
                    probe=self.contest.feed,
                    positions=positions_to_come(self.contest.model, self.contest.configs[name]),
                )
                with tracing(context):
                    compiled[name] = backend(graph, example_inputs)
                self.sites += backend.sites
            return compiled[name](*inputs)

        return run
