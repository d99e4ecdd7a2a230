"""Attention statistics of a prefill, and the OQ ratios that follow from them.

The paper (arXiv 2603.08727) looks at A [B, H, W, N], the probabilities of the last W queries over
the N keys before the window. Only those W rows are ever computed: nothing of size T x T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arkv_fx.calibration import LayerStatistics
from arkv_fx.kernels.softmax import allowed, group, hide, softmax


@dataclass(frozen=True)
class Moments:
    """Statistics of one layer on one sample.

    ``entropy`` in nats, ``variance`` and ``kurtosis`` (Pearson's m4 / m2**2) over the query axis,
    each summed as published or averaged, see ``measure``.
    """

    entropy: float
    variance: float
    kurtosis: float


def observed_attention(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Probabilities of the last ``window`` queries over the keys before the window.

    Args:
        q: [B, Hq, T, D], k: [B, Hkv, T, D]; mask: [B or 1, H or 1, T, T] or None (causal).

    Returns:
        [B, Hq, W, N] float32 with W = min(window, T - 1) and N = T - W, and the mask's real
        tokens, [B, T] bool.
    """
    batch, heads, length, _ = k.shape
    rows = max(1, min(window, length - 1))
    logits = group(q[:, :, -rows:].float(), heads) @ k[:, :, None].float().transpose(-1, -2) * scale
    position = torch.arange(length, device=q.device)
    if mask is None:
        logits = hide(logits, position[None, :] <= position[-rows:, None])
        real = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    else:
        part = mask[:, :, -rows:, -length:]
        grouped = part.unflatten(1, (heads, -1)) if part.shape[1] > 1 else part[:, :, None]
        logits = hide(logits, grouped)
        real = allowed(mask[..., -length:]).diagonal(dim1=-2, dim2=-1).any(1).expand(batch, length)
    probs = softmax(logits, None).flatten(1, 2)
    return probs[..., : length - rows], real


def measure(probs: Tensor, real: Tensor, *, published: bool) -> Moments:
    """Entropy, variance and kurtosis of A [B, H, W, N].

    ``published`` sums over everything, as the paper does, so the numbers grow with batch and
    prompt. Otherwise each is an average that does not: entropy per query over the log of the keys
    it could see, the coefficient of variation squared instead of the variance, and the kurtosis
    averaged over keys weighted by the mass they got; ``real`` [B, T] leaves padding out.
    """
    mean = probs.mean(-2, keepdim=True)
    centred = probs - mean
    m2, m4 = centred.square().mean(-2), centred.pow(4).mean(-2)
    kurtosis = m4 / m2.square().clamp(min=1e-30)
    entropies = -torch.special.xlogy(probs, probs).sum(-1)
    if published:
        return Moments(float(entropies.sum()), float(m2.sum()), float(kurtosis.sum()))
    keys = real[:, : probs.shape[-1]]
    rows = real[:, -probs.shape[-2] :]
    count = keys.sum(-1).clamp(min=2).float()
    # Attention inside the window is not looked at: renormalise, or a local head would look sharp.
    total = probs.sum(-1).clamp(min=1e-12)
    renormalised = entropies / total + total.log()
    weight = rows[:, None].float().expand_as(entropies)
    entropy = (renormalised / count.log()[:, None, None] * weight).sum() / weight.sum().clamp(min=1)
    shown = keys[:, None].expand_as(m2)
    share = torch.where(shown, mean.squeeze(-2), 0.0)
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-12)
    relative = m2 / mean.squeeze(-2).square().clamp(min=1e-30)
    rows_of = share.shape[0] * share.shape[1]
    return Moments(
        float(entropy),
        float((relative * share).sum() / rows_of),
        float((kurtosis * share).sum() / rows_of),
    )


def mean_moments(samples: Sequence[Moments]) -> Moments:
    """Averaged over prompts."""
    columns = torch.tensor([[m.entropy, m.variance, m.kurtosis] for m in samples])
    return Moments(*columns.double().mean(0).tolist())


def oq_score(moments: Moments, taus: Sequence[float]) -> float:
    """entropy^(1/tau1) * variance^(1/tau2) * kurtosis^(1/tau3), as published."""
    parts = (moments.entropy, moments.variance, moments.kurtosis)
    return math.prod(math.pow(max(x, 0.0), 1 / t) for x, t in zip(parts, taus, strict=True))


def oq_ratios(
    layers: Sequence[int],
    moments: Sequence[Moments],
    taus: Sequence[float],
    mode: str,
    target: float,
) -> tuple[LayerStatistics, ...]:
    """One OQ ratio per layer.

    "paper": score / max over layers. Otherwise: ``target`` (the configured mean share of
    Originals) times score / mean over layers, kept within 0 and 1, so that the calibration moves
    Originals between layers without changing how many there are.
    """
    scores = [oq_score(m, taus) for m in moments]
    top, mean = max(scores), sum(scores) / len(scores)
    rows = []
    for layer, m, score in zip(layers, moments, scores, strict=True):
        if mode == "paper":
            ratio = score / top if top > 0 else 1.0
        else:
            ratio = target * score / mean if mean > 0 else target
        rows.append(
            LayerStatistics(layer, m.entropy, m.variance, m.kurtosis, score, min(1.0, ratio))
        )
    return tuple(rows)
