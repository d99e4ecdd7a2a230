"""A prompt whose keys and values wait for the plan that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig
from arkv_fx.costs.output_errors import OutputErrors
from arkv_fx.errors import CalibrationError
from arkv_fx.ops.as_given import as_given
from arkv_fx.ops.attend import Seen, look, settle
from arkv_fx.ops.signatures import AttendArguments
from arkv_fx.plan import LayerPlan, plan_calibrated
from arkv_fx.state.session import LayerState, check_finite
from arkv_fx.state.view import view


class Waiting(OutputErrors):
    """A stand-in for ``arkv::attend`` that leaves what is to be kept for later."""

    def __init__(self, config: ArkvConfig) -> None:
        super().__init__(config)
        self.seen: dict[int, tuple[LayerPlan, Seen]] = {}

    def attend(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        """``arkv::attend`` with the layer in front of its arguments."""
        given: AttendArguments[Tensor] = AttendArguments(*args, **kwargs)
        if layer in self.seen or given.computed:
            raise CalibrationError(f"layer {layer} computes keys from its cache, or shares it")
        with as_given(given.q):
            return self._attend(layer, given)

    def _attend(self, layer: int, given: AttendArguments[Tensor]) -> Tensor:
        seen: list[Seen] = []

        def first_half(q: Tensor, k: Tensor, v: Tensor, mask: Any, state: Any, plan: LayerPlan,
                       knobs: Any, fresh: bool, *rest: Any) -> Tensor:  # fmt: skip
            out, found = look(q, k, v, mask, view(plan, state), knobs, True, *rest)
            seen.append(found)
            self.note(layer, replace(given, fresh=True), out)
            return out

        out = given.run(first_half)
        self.seen[layer] = given.layer_plan, seen[0]
        return out

    def states(self, calibration: Calibration, windows: Sequence[int]) -> dict[int, LayerState]:
        """Each layer's state under its plan; ``windows`` are the layers' attention windows.

        Raises:
            NonFiniteError: if keys or values were not finite.
        """
        found = {}
        for layer, (shape, seen) in self.seen.items():
            plan = plan_calibrated(
                self.config, calibration, layer, windows, heads=shape.heads, k_dim=shape.k_dim,
                v_dim=shape.v_dim, dtype=shape.dtype, sliding=shape.sliding,
                positions=shape.positions,
            )  # fmt: skip
            state = LayerState(plan, len(seen.new.k), seen.new.k.device)
            with as_given(seen.new.k):
                settle(state.view(), seen, fresh=True)
            found[layer] = state
        self.seen.clear()
        check_finite(found.items())
        return found
