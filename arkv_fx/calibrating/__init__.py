"""``calibrate(model, input_ids)``: run sample prefills and read each layer's attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arkv_fx.allocation import allocate, mean
from arkv_fx.calibrating import sensitivity
from arkv_fx.calibrating.samples import read_samples, shipped_sample
from arkv_fx.calibration import Calibration, LayerStatistics, fingerprint
from arkv_fx.config import ArkvConfig
from arkv_fx.costs.attention_statistics import (
    Moments,
    mean_moments,
    measure,
    observed_attention,
    oq_ratios,
)
from arkv_fx.costs.output_errors import Found, OutputErrors, calibrated
from arkv_fx.errors import CalibrationError, ConfigError, TransformError
from arkv_fx.huggingface.wrapped import generating_part
from arkv_fx.kept import keep
from arkv_fx.options import require_type
from arkv_fx.transforming import _transform, restore


def calibrate(
    model: nn.Module,
    input_ids: Tensor | Sequence[Tensor] | None = None,
    config: ArkvConfig | None = None,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Calibration:
    """Measure a model on sample prompts; give every layer its OQ ratio and share of the budget.

    The same passes find the attention; each site's last ``config.window`` queries are read for the
    paper's statistics. Under ``config.calibration="output"`` each layer is asked in passing what
    its attention would have answered under budgets from 1/32 to all of the full cache
    (``output_errors``): one prefill, whose result is solved again for the budget of whoever uses
    it. Under "measured" each layer is compressed alone in several ways (``sensitivity``), a short
    forward for each, at the configured budget. In both the bytes go where they help most; the sum
    of budgets stays what it was. The model is restored afterwards, also after an error.

    Args:
        input_ids: [B, T] int64, or a list of them; a few prompts of the length and kind to be
            served are enough. Statistics are averaged over prompts.
        config: how the cache will be used; under "measured" a ``compression`` is taken to be meant
            at the length of each prompt.
        attention_mask: [B, T] per prompt, 0 for padding.
        tokenizer: of transformers, instead of prompts: a text that is shipped (``arkv_fx.texts``)
            is read, ``config.context`` tokens of it or what it has. The result is kept in the cache
            folder (``ARKV_CACHE``), where a later ``transform(model)`` with the same weights and
            options, the budget aside, finds it.
        progress: called with what is done next.

    Raises:
        CalibrationError: if a prompt is too short or none of this model, or no attention could be
            read; or for neither or both of prompts and a tokenizer.
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
    if (input_ids is None) == (tokenizer is None):
        raise CalibrationError(
            "give prompts (input_ids), or a tokenizer for a text that is shipped"
        )
    if tokenizer is not None:
        input_ids = shipped_sample(model, tokenizer, config.context)
    samples = read_samples(model, input_ids, attention_mask)
    lengths = tuple(int(prompt.shape[1]) for prompt, _ in samples)
    if config.calibration == "output":
        found = _by_output(model, samples, config, progress)
        calibration = calibrated(fingerprint(model), found, lengths, config)
    else:
        rows = _by_attention(model, samples, config, progress)
        if config.calibration == "measured":
            rows = _measured(model, samples, config, rows, progress)
        whose, mode = fingerprint(model), config.calibration
        calibration = Calibration(whose, mode, config.taus, lengths, rows)
    if tokenizer is not None:
        keep(calibration, model, config)
    return calibration


Samples = Sequence[tuple[Tensor, Tensor | None]]


def _by_attention(
    model: nn.Module, samples: Samples, config: ArkvConfig, progress: Callable[[str], None]
) -> tuple[LayerStatistics, ...]:
    """A row for each layer whose attention can be read: statistics, and the ratios of these."""
    found: dict[int, list[Moments]] = defaultdict(list)
    published = config.calibration == "paper"

    def probe(
        layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        probs, real = observed_attention(q, k, mask, scale, config.window)
        found[layer].append(measure(probs, real, published=published))

    longest = max(prompt.shape[1] for prompt, _ in samples)
    _transform(model, config.smallest(longest), None, compile="eager", probe=probe)
    try:
        progress(f"attention statistics of {len(samples)} prompts")
        for prompt, mask in samples:
            model(input_ids=prompt, attention_mask=mask, use_cache=True)
    finally:
        restore(model)
    _require_layers(model, found)
    layers = sorted(found)
    means = [mean_moments(found[i]) for i in layers]
    return oq_ratios(layers, means, config.taus, config.calibration, config.oq_ratio)


@torch.no_grad()
def _by_output(
    model: nn.Module, samples: Samples, config: ArkvConfig, progress: Callable[[str], None]
) -> list[dict[int, Found]]:
    """What each layer loses under many budgets, for each prompt."""
    found: list[dict[int, Found]] = []
    for prompt, mask in samples:
        progress(f"prefill of {prompt.shape[1]} tokens")
        errors = OutputErrors(config)
        smallest = config.smallest(prompt.shape[1])
        _transform(model, smallest, None, compile="eager", stand_in=errors.attend)
        try:
            short = "logits_to_keep" in model.arkv.parameters  # type: ignore[operator, union-attr]
            kept = {"logits_to_keep": 1} if short else {}
            model(input_ids=prompt, attention_mask=mask, use_cache=True, **kept)
        finally:
            restore(model)
        _require_layers(model, errors.found)
        found.append(errors.found)
    return found


def _require_layers(model: nn.Module, found: Sized) -> None:
    if not found:
        raise CalibrationError(
            f"no attention of {type(model).__name__} could be read: model.arkv.report() after "
            "transform says why each site is left alone"
        )


def _measured(
    model: nn.Module,
    samples: Samples,
    config: ArkvConfig,
    rows: Sequence[LayerStatistics],
    progress: Callable[[str], None],
) -> tuple[LayerStatistics, ...]:
    """The rows with the shares and OQ ratios that cost least, sliding layers as configured."""
    costs = mean(
        [sensitivity.divergences(model, ids, mask, config, progress) for ids, mask in samples]
    )
    chosen = allocate(costs)
    out = []
    for row in rows:
        if (option := chosen.get(row.layer)) is None:
            out.append(replace(row, oq_ratio=config.oq_ratio))
        else:
            cost = costs[row.layer][option]
            out.append(replace(row, oq_ratio=option.oq_ratio, share=option.share, divergence=cost))
    return tuple(out)
