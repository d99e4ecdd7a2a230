"""How much each layer minds a smaller cache: compress one at a time, compare the predictions.

Layers differ by two orders of magnitude in what their compression does to the output (as KVTuner,
arXiv 2502.04420, found for precision), which no statistic of their attention showed us; so it is
measured. The bytes then go where they buy most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from arkv_fx.allocation import SHARES, Costs, Option
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import CalibrationError, ConfigError
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.transformed import Transformed
from arkv_fx.kernels.softmax import full_attention
from arkv_fx.ops.attend import attend, peek
from arkv_fx.ops.no_output import NoOutput
from arkv_fx.ops.signatures import AttendArguments
from arkv_fx.plan import LayerPlan, allowance, plan_layer
from arkv_fx.state.session import LayerState
from arkv_fx.transforming import _transform, restore

RATIOS = (1.0, 0.7, 0.5, 0.3)
"""OQ ratios, largest first, that are tried where the budget holds every token as it is."""
PROBE = 128
"""At most so many tokens at a prompt's end are predicted; an eighth of a shorter prompt."""


class Trials:
    """The stand-in for ``arkv::attend`` while layers are tried.

    The prefill keeps every layer's keys and values, and fills a state for it under every option.
    Later calls leave all of them as they are: the layer of ``now`` (layer, option) reads its
    compressed state, every other layer what was kept.
    """

    def __init__(self, config: ArkvConfig, tokens: int) -> None:
        self.config, self.tokens = config, tokens
        self.states: dict[int, dict[Option, LayerState]] = {}
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self.now: tuple[int, Option] | None = None

    def attend(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        """``arkv::attend`` with the layer in front of its arguments."""
        given: AttendArguments[Tensor] = AttendArguments(*args, **kwargs)
        q, k, v, mask = given.q, given.k, given.v, given.mask
        if layer not in self.prefix:  # whether or not the graph knows that nothing came before
            self.prefix[layer] = k, v
            given = replace(given, fresh=True)
            if not given.layer_plan.sliding:  # it is bounded already and keeps its own plan
                self._fill(layer, given)
            return given.run(peek)
        if self.now is not None and self.now[0] == layer:
            tried = self.states[layer][self.now[1]]
            return replace(given, state=tried.tensors, fresh=False).run(peek, tried.plan)
        keys, values = (
            torch.cat([a, b], 2) for a, b in zip(self.prefix[layer], (k, v), strict=True)
        )
        scale, softcap, sinks = given.scale, given.softcap, given.sink_logits
        if softcap or sinks is not None:
            return full_attention(q, keys, values, mask, mask is None, scale, softcap, sinks)
        return scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    def _fill(self, layer: int, given: AttendArguments[Tensor]) -> None:
        self.states[layer] = {}
        batch, device = len(given.k), given.k.device
        for option, plan in options(self.config, given.layer_plan, self.tokens).items():
            state = self.states[layer][option] = LayerState(plan, batch, device)
            with NoOutput():
                replace(given, state=state.tensors).run(attend, plan)


def options(config: ArkvConfig, shape: LayerPlan, tokens: int) -> dict[Option, LayerPlan]:
    """What a layer may be given, with its plan: every share with the configured OQ ratio, and
    where all ``tokens`` have room, with the largest ratio that leaves them room. Shares that do not
    hold the window and the sinks are left out.

    Raises:
        ConfigError: if the configured budget does not hold the window and the sinks.
        CalibrationError: if it holds all tokens, so that nothing can be learned.
    """

    def plan(share: float, ratio: float) -> LayerPlan:
        return plan_layer(
            config, heads=shape.heads, k_dim=shape.k_dim, v_dim=shape.v_dim, dtype=shape.dtype,
            oq_ratio=ratio, share=share, calibrated=True, positions=shape.positions,
        )  # fmt: skip

    given, bare = allowance(config, shape), plan(0.0, 0.0)
    least = bare.ring if config.budget is not None else bare.nbytes()
    if least > given:
        unit = "tokens" if config.budget is not None else "bytes"
        raise ConfigError(
            f"a budget of {given} {unit} does not hold the window and the sinks ({least} {unit}), "
            "so measuring says nothing: give longer prompts, lower compression or raise bytes"
        )
    out: dict[Option, LayerPlan] = {}
    for share in SHARES:
        if given * share < least:
            continue
        out[Option(share, config.oq_ratio)] = plan(share, config.oq_ratio)
        for ratio in RATIOS if len(config.tiers) == 2 else ():
            richer = plan(share, ratio)
            if ratio > config.oq_ratio and richer.slots >= tokens:
                out[Option(share, ratio)] = richer
                break
    if out[Option(1.0, config.oq_ratio)].tiers[0].slots >= tokens:
        raise CalibrationError(
            f"the configured budget holds all {tokens} tokens of the calibration prompt at full "
            "quality, so measuring says nothing: give longer prompts, or calibration='normalised'"
        )
    return out


@torch.no_grad()
def divergences(
    model: nn.Module,
    prompt: Tensor,
    mask: Tensor | None,
    config: ArkvConfig,
    progress: Callable[[str], None] = lambda message: None,
) -> Costs:
    """KL(full || one layer compressed), mean over the prompt's last tokens, by layer and option.

    Args:
        model: a causal language model that is not transformed.
        prompt: [B, T] int64; all but its end are prefilled, its end is one chunk after it.
        mask: [B, T] or None, 0 for padding on the left.
        config: a ``compression`` is meant at the tokens that are prefilled.

    Raises:
        CalibrationError: for a prompt that is too short for the window or for the budget.
    """
    probe = min(PROBE, prompt.shape[1] // 8)
    context = prompt.shape[1] - probe
    if probe < 2 or context <= config.window + config.sinks:
        raise CalibrationError(
            f"a prompt of {prompt.shape[1]} tokens is too short to measure layers behind a window "
            f"of {config.window}: give longer prompts, or calibration='normalised'"
        )
    smallest = config.smallest(prompt.shape[1])
    if config.compression is not None:
        config = config.replace(context=context)
    trials = Trials(config, context)
    _transform(model, smallest, None, compile="eager", stand_in=trials.attend)
    transformed: Transformed = model.arkv  # type: ignore[assignment]
    try:
        cache = ArkvCache(model)

        def forward(tokens: slice, **options: Any) -> Tensor:
            out = model(
                input_ids=prompt[:, tokens], past_key_values=cache, use_cache=True,
                attention_mask=None if mask is None else mask[:, : tokens.stop], **options,
            )  # fmt: skip
            logits: Tensor = out.logits
            return logits

        def probed() -> Tensor:
            cache.seen = cache.session.tokens = context  # the states have not moved
            return forward(slice(context, context + probe)).float().log_softmax(-1)

        short = "logits_to_keep" in transformed.parameters
        progress(f"prefill of {context} tokens")
        forward(slice(0, context), **({"logits_to_keep": 1} if short else {}))
        reference = probed()
        found: Costs = {}
        for layer, states in sorted(trials.states.items()):
            progress(f"layer {layer}: {len(states)} budgets")
            found[layer] = {}
            for option in states:
                trials.now = (layer, option)
                ours = probed()
                kl = (reference.exp() * (reference - ours)).sum(-1).mean()
                found[layer][option] = max(0.0, float(kl))
        return found
    finally:
        restore(model)
