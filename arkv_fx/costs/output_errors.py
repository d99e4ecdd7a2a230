"""What each layer loses when it is compressed, from ONE prefill: the error of its attention.

Causal keys do not change when more tokens follow. So the prompt's first tokens, as the prefill has
them, are what a shorter prompt would have left in the cache, and its last queries are those of a
chunk behind it. Each layer is asked, while the prefill passes through it: what would these queries
have got, had the first tokens been kept under this plan or that? The relative error of the answer
ranks layers nearly as well as the divergence of the whole model's predictions does, which takes a
forward for each plan (``sensitivity``), and shares out bytes better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig
from arkv_fx.costs.attention_statistics import (
    Moments,
    mean_moments,
    measure,
    observed_attention,
    oq_ratios,
)
from arkv_fx.errors import CalibrationError
from arkv_fx.formats import Codec
from arkv_fx.kernels.reference import gather
from arkv_fx.kernels.softmax import group, hide, hide_new
from arkv_fx.ops.as_given import as_given
from arkv_fx.ops.attend import look, peek, settle
from arkv_fx.ops.balance import SCALE, scaled
from arkv_fx.ops.blocks import columns_logits
from arkv_fx.ops.no_output import NoOutput
from arkv_fx.ops.signatures import AttendArguments
from arkv_fx.plan import LayerPlan, plan_layer, size_of, sized
from arkv_fx.state.session import LayerState
from arkv_fx.state.view import Segment, view

SIZES = tuple(n / 32 for n in (1, 2, 4, 6, 8, 12, 16, 24, 32))
"""Budgets that are tried, as fractions of the full cache in 16 bits: half of 16x to all of it."""
RATIOS = (0.0, 0.1, 0.2, 0.4, 0.7)
"""OQ ratios that are tried. All in full quality keeps few tokens: only where it keeps every one."""
PROBE = 64
"""At most so many tokens at a prompt's end come as a chunk; an eighth of a shorter prompt."""
EVERY = 2
"""Each second of their queries is asked: neighbours ask much the same."""


@dataclass
class Found:
    """Of one layer: its shape, statistics of its attention, and (size, OQ ratio, error) of what
    was tried."""

    shape: LayerPlan
    moments: Moments
    tried: list[tuple[float, float, float]]


class OutputErrors:
    """The stand-in for ``arkv::attend`` in the prefill that calibrates.

    It answers with full attention. ``found`` has every layer; sliding layers, keys computed from
    the cache and caches that several layers share are not tried, and keep the plan of the
    configuration.
    """

    def __init__(self, config: ArkvConfig) -> None:
        self.config = config
        self.found: dict[int, Found] = {}

    def attend(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        """``arkv::attend`` with the layer in front of its arguments."""
        given: AttendArguments[Tensor] = AttendArguments(*args, **kwargs)
        given = replace(given, fresh=True)  # whether or not the graph knows that it is
        out = given.run(peek)
        with as_given(given.q):
            self.note(layer, given, out)
        return out

    def note(self, layer: int, given: AttendArguments[Tensor], out: Tensor) -> None:
        """Take down what is found of a layer whose full attention gave ``out``."""
        if layer in self.found:
            self.found[layer].tried = []
            return
        k = given.computed[0] if given.computed else given.k
        probs, real = observed_attention(given.q, k, given.mask, given.scale, self.config.window)
        moments = measure(probs, real, published=False)
        found = self.found[layer] = Found(given.layer_plan, moments, [])
        if not given.layer_plan.sliding and not given.computed:
            found.tried = _try_plans(self.config, given, out, real)


def _try_plans(
    config: ArkvConfig, given: AttendArguments[Tensor], out: Tensor, real: Tensor
) -> list[tuple[float, float, float]]:
    """(size, OQ ratio, error) of each plan; ``out`` [B, Hq, T, Dv], ``real`` [B, T] bool."""
    length = given.k.shape[2]
    before = length - min(PROBE, length // 8)
    shape, mask = given.layer_plan, given.mask
    plans = _plans(config, shape, before) if before > config.window + config.sinks else []
    if not plans or before == length:
        raise CalibrationError(
            f"a prompt of {length} tokens is too short to try budgets behind a window of "
            f"{config.window}: give longer prompts, or calibration='normalised'"
        )
    q, k, v = (x[:, :, :before].detach() for x in (given.q, given.k, given.v))
    batch, device = len(k), k.device
    first = replace(plans[0][2], tiers=shape.tiers)  # the ranks are the same under all plans
    with NoOutput():
        shown = None if mask is None else mask[..., :before, :before]
        empty = view(first, LayerState(first, batch, device).tensors)
        _, seen = look(q, k, v, shown, empty, given.knobs, fresh=True)
    if first.balanced:
        q, k = scaled(given.q.detach(), given.k.detach(), seen.layer[SCALE])
        given = replace(given, q=q, k=k)
    asked = slice(before + (length - before - 1) % EVERY, None, EVERY)  # the last is one of them
    columns = _Columns(given, before, asked)
    truth, rows = out[:, :, asked].float(), real[:, asked]
    energy = truth.square().sum((1, 3)).clamp(min=1e-30)
    found = []
    for size, ratio, plan in plans:
        held = view(plan, LayerState(plan, batch, device).tensors)
        settle(held, seen, fresh=True, encoder=_no_codes)
        error = (columns.attend(held.segments) - truth).square().sum((1, 3)) / energy
        mean = torch.where(rows, error, 0.0).sum() / rows.sum().clamp(min=1)
        found.append((size, ratio, float(f"{float(mean):.4g}")))
    return found


def _plans(
    config: ArkvConfig, shape: LayerPlan, tokens: int
) -> list[tuple[float, float, LayerPlan]]:
    """(size, OQ ratio, plan) of all that hold window and sinks, the smallest first.

    Sizes end where a plan holds all ``tokens`` in full quality: no larger one is any better.
    """

    def plan(size: float, ratio: float) -> LayerPlan:
        return plan_layer(
            sized(config, shape, size, tokens), heads=shape.heads, k_dim=shape.k_dim,
            v_dim=shape.v_dim, dtype=shape.dtype, oq_ratio=ratio,
            calibrated=True, positions=shape.positions,
        )  # fmt: skip

    found: list[tuple[float, float, LayerPlan]] = []
    for size in SIZES:
        best = plan(size, 1.0)
        if best.slots == best.ring:
            continue
        if best.tiers[0].slots + best.ring >= tokens:
            return [*found, (size, 1.0, best)]
        ratios = RATIOS if len(config.tiers) == 2 else (1.0,)
        here = [(size, ratio, plan(size, ratio)) for ratio in ratios]
        # Where more Originals hold every token as well, fewer waste bytes.
        whole = sum(each.slots >= tokens for _, _, each in here)
        found += here[max(0, whole - 1) :]
    return found


def _no_codes(
    codec: Codec, x: Tensor, source: Tensor, centre: Tensor | None, fields: list[Tensor]
) -> None:
    """An ``Encoder``: which token a slot holds is all that is asked."""


class _Columns:
    """The queries' exponentials over the first tokens, once for each format of the keys.

    A plan's attention is a sum over the rows that its slots hold: nothing is encoded twice.
    """

    def __init__(self, given: AttendArguments[Tensor], before: int, asked: slice) -> None:
        self.given, self.before = given, before
        self.plan, self.knobs = given.layer_plan, given.knobs
        self.q = given.q[:, :, asked].detach()
        self.mask = None if given.mask is None else given.mask[:, :, asked]
        self.stored: dict[str, tuple[Tensor, Tensor]] = {}
        batch, length = len(self.q), given.k.shape[2]
        pos = torch.arange(length, device=self.q.device, dtype=torch.int32)
        own = self._logits(given.k[:, :, before:])
        own = hide_new(own, self.mask, self.plan, pos[asked].expand(batch, -1))
        self.top = own.amax((3, 4), keepdim=True).clamp(min=torch.finfo(own.dtype).min)
        exact = self._hidden(self._logits(given.k[:, :, :before]))
        self.top = torch.maximum(self.top, exact.amax((3, 4), keepdim=True))
        ones = given.v.new_ones(*given.v.shape[:3], 1, dtype=torch.float32)
        self.values = torch.cat([given.v.detach().float(), ones], -1)
        self.own = self._rows(own).transpose(-1, -2) @ self.values[:, :, before:]
        if (sinks := self.knobs.sink_logits) is not None:
            rest = torch.exp(sinks.float().view(1, self.plan.heads, -1, 1, 1) - self.top)
            self.own[..., -1] += rest.expand(batch, -1, -1, self.q.shape[2], 1).flatten(2)

    def attend(self, segments: list[Segment]) -> Tensor:
        """Output [B, Hq, Q, Dv], float32, over what the segments' slots hold and the new tokens."""
        total = self.own
        for segment in segments:
            filled = (segment.pos >= 0).any(0).any(0)
            places = segment.pos[..., filled].long()
            if not places.shape[-1]:
                continue
            rows, values = self._stored(segment)
            places = torch.where(places < 0, self.before, places)  # a row of zeros
            total = total + gather(rows, places).transpose(-1, -2) @ gather(values, places)
        out = total[..., :-1] / total[..., -1:].clamp(min=1e-30)
        output: Tensor = out.unflatten(2, (-1, self.q.shape[2])).flatten(1, 2)
        return output

    def _stored(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """Exponentials [B, Hkv, N + 1, G * Q] and values [B, Hkv, N + 1, Dv + 1] of all tokens."""
        name = segment.format.name
        if name not in self.stored:
            k, v = (x[:, :, : self.before].detach().float() for x in (self.given.k, self.given.v))
            centre = segment.centre if segment.centre is not None else torch.zeros_like(k[:, :, :1])
            k = segment.format.key.roundtrip(k - centre) + centre
            v = segment.format.value.roundtrip(v)
            values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
            rows = self._rows(self._hidden(self._logits(k)))
            nothing = (0, 0, 0, 1)
            self.stored[name] = (
                nn.functional.pad(rows, nothing), nn.functional.pad(values, nothing)
            )  # fmt: skip
        return self.stored[name]

    def _logits(self, k: Tensor) -> Tensor:
        """[B, Hkv, G, Q, N], float32."""
        return columns_logits(self.q, k, self.plan, self.knobs)

    def _hidden(self, logits: Tensor) -> Tensor:
        """Those of the first tokens, all of which come before the queries, under the mask."""
        if self.mask is None:
            return logits
        part = self.mask[..., : self.before]
        return hide(logits, group(part, self.plan.heads) if part.shape[1] > 1 else part[:, :, None])

    def _rows(self, logits: Tensor) -> Tensor:
        """Exponentials as [B, Hkv, N, G * Q]."""
        return torch.exp(logits - self.top).flatten(2, 3).transpose(-1, -2).contiguous()


def calibrated(
    whose: str, found: Sequence[Mapping[int, Found]], lengths: Sequence[int], config: ArkvConfig
) -> Calibration:
    """The calibration that follows for the budget of ``config``.

    Args:
        whose: fingerprint of the model.
        found: of each prompt, by layer.
        lengths: tokens of each prompt.
    """
    layers = sorted(found[0])
    means = [mean_moments([each[layer].moments for each in found]) for layer in layers]
    rows = tuple(
        replace(row, oq_ratio=config.oq_ratio, costs=_mean([each[row.layer] for each in found]))
        for row in oq_ratios(layers, means, config.taus, "output", config.oq_ratio)
    )
    unit = "bytes" if config.budget is None else "tokens"
    calibration = Calibration(whose, "output", config.taus, tuple(lengths), rows, unit)
    shapes = [each.shape for each in found[0].values() if each.tried]
    return calibration.at(size_of(config, shapes[0]), unit) if shapes else calibration


def _mean(samples: Sequence[Found]) -> tuple[tuple[float, float, float], ...]:
    """Errors averaged over prompts, of what was tried with all of them."""
    by_place = [{(size, ratio): error for size, ratio, error in one.tried} for one in samples]
    return tuple(
        (*place, sum(errors[place] for errors in by_place) / len(by_place))
        for place in by_place[0]
        if all(place in errors for errors in by_place)
    )
