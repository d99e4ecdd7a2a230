"""``calibrate(model, input_ids)``: run sample prefills and read each layer's attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arkv_fx.calibrating import sensitivity
from arkv_fx.calibrating.attention_statistics import Moments, measure, observed_attention, oq_ratios
from arkv_fx.calibrating.samples import read_samples
from arkv_fx.calibration import Calibration, LayerStatistics, fingerprint
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import CalibrationError, ConfigError, TransformError
from arkv_fx.huggingface.wrapped import generating_part
from arkv_fx.options import require_type
from arkv_fx.transforming import _transform, restore


def calibrate(
    model: nn.Module,
    input_ids: Tensor | Sequence[Tensor],
    config: ArkvConfig | None = None,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    *,
    progress: Callable[[str], None] = lambda message: None,
) -> Calibration:
    """Measure a model on sample prompts; give every layer its OQ ratio and share of the budget.

    The same passes find the attention; a probe on each site reads the last ``config.window``
    queries for the paper's statistics. Under ``config.calibration="measured"`` each layer is then
    compressed alone in several ways (``sensitivity``), a short forward for each, and the bytes go
    where they lower the divergence most; the sum of budgets stays what it was. The model is
    restored afterwards, also after an error.

    Args:
        input_ids: [B, T] int64, or a list of them; a few prompts of the length and kind to be
            served are enough. Statistics are averaged over prompts.
        config: how the cache will be used; a ``compression`` is taken to be meant at the length
            of each prompt.
        attention_mask: [B, T] per prompt, 0 for padding.
        progress: called with what is done next.

    Raises:
        CalibrationError: if a prompt is too short or none of this model, or no attention could be
            read.
        ConfigError: for an argument of another type.
        TransformError: if the model is transformed: restore it first.

    Example:
        >>> import torch, arkv_fx
        >>> from arkv_fx.models import random_model
        >>> model, prompt = random_model("llama"), torch.randint(1, 128, (1, 60))
        >>> config = arkv_fx.ArkvConfig(budget=40, window=8, calibration="normalised")
        >>> [row.layer for row in arkv_fx.calibrate(model, prompt, config).layers]
        [0, 1]
    """
    config = ArkvConfig() if config is None else config
    require_type("model", model, nn.Module, "an nn.Module")
    require_type("config", config, ArkvConfig, "an ArkvConfig, or None")
    if not callable(progress):
        raise ConfigError(f"progress={progress!r}: give a function of a text")
    if hasattr(model, "arkv"):
        raise TransformError("the model is transformed: call arkv_fx.restore(model) first")
    model = generating_part(model)
    if model.training:
        raise CalibrationError("the model is in train mode: call model.eval() first")
    samples = read_samples(model, input_ids, attention_mask)
    prompts, masks = [prompt for prompt, _ in samples], [mask for _, mask in samples]
    found: dict[int, list[Moments]] = defaultdict(list)
    published = config.calibration == "paper"

    def probe(
        layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        probs, real = observed_attention(q, k, mask, scale, config.window)
        found[layer].append(measure(probs, real, published=published))

    _transform(model, ArkvConfig.smallest(config.window), None, compile="eager", probe=probe)
    try:
        progress(f"attention statistics of {len(prompts)} prompts")
        for prompt, mask in zip(prompts, masks, strict=True):
            model(input_ids=prompt, attention_mask=mask, use_cache=True)
    finally:
        restore(model)
    if not found:
        raise CalibrationError(
            f"no attention of {type(model).__name__} could be read: model.arkv.report() after "
            "transform says why each site is left alone"
        )
    layers = sorted(found)
    rows = oq_ratios(
        layers, [_mean(found[i]) for i in layers], config.taus, config.calibration, config.oq_ratio
    )
    if config.calibration == "measured":
        rows = _measured(model, prompts, masks, config, rows, progress)
    lengths = tuple(int(p.shape[1]) for p in prompts)
    return Calibration(fingerprint(model), config.calibration, config.taus, lengths, rows)


def _measured(
    model: nn.Module,
    prompts: Sequence[Tensor],
    masks: Sequence[Any],
    config: ArkvConfig,
    rows: Sequence[LayerStatistics],
    progress: Callable[[str], None],
) -> tuple[LayerStatistics, ...]:
    """The rows with the shares and OQ ratios that cost least, sliding layers as configured."""
    pairs = zip(prompts, masks, strict=True)
    costs = sensitivity.mean(
        [sensitivity.divergences(model, ids, mask, config, progress) for ids, mask in pairs]
    )
    chosen = sensitivity.allocate(costs)
    out = []
    for row in rows:
        if (option := chosen.get(row.layer)) is None:
            out.append(replace(row, oq_ratio=config.oq_ratio))
        else:
            cost = costs[row.layer][option]
            out.append(replace(row, oq_ratio=option.oq_ratio, share=option.share, divergence=cost))
    return tuple(out)


def _mean(samples: Sequence[Moments]) -> Moments:
    columns = torch.tensor([[m.entropy, m.variance, m.kurtosis] for m in samples])
    return Moments(*columns.double().mean(0).tolist())
