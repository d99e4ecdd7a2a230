"""What quantized weights of linear layers cost: predictions against those of the originals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arkv_fx.calibration import tensors_inside
from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.results import Row
from arkv_fx.weights.quantizing import WEIGHTS, quantize


@torch.no_grad()
def weight_error(
    model: Any,
    texts: Mapping[str, Tensor],
    *,
    context: int = 512,
    kinds: Sequence[str] = WEIGHTS,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """A row for each kind of weights; the model keeps its own.

    Args:
        model: a causal language model of transformers, in eval mode, not quantized.
        texts: token ids [T] by name, of which the first ``context`` are read, without a cache.
        kinds: of ``weights`` in ``arkv_fx.transform``.

    Returns:
        ``weights``; ``bytes`` of all parameters; ``kl`` in nats from the predictions of the
        original weights, a mean over all tokens; ``top1``, the share of them whose likeliest next
        token is the same; ``perplexity_ratio`` against the original's.

    Raises:
        EvaluationError: if a text is shorter than two tokens.
        TransformError: see ``quantize``.
    """
    if short := [name for name, ids in texts.items() if len(ids) < 2]:
        raise EvaluationError(f"{', '.join(short)}: two tokens at least are needed")
    parts = {name: ids[:context][None].to(model.device) for name, ids in texts.items()}
    reference = {}
    for name, ids in parts.items():
        progress(f"read {name}")
        reference[name] = _predictions(model, ids)
    rows: list[Row] = [
        {"weights": "own", "bytes": weight_bytes(model), "kl": 0.0, "top1": 1.0,
         "perplexity_ratio": 1.0}
    ]  # fmt: skip
    for kind in kinds:
        progress(f"quantize to {kind}")
        done = quantize(model, kind, keep=True)
        try:
            nbytes = weight_bytes(model)
            found = [
                _compare(reference[name], _predictions(model, ids), ids[0, 1:])
                for name, ids in parts.items()
            ]
        finally:
            done.restore()
        kl, same, worse = torch.cat(found, 1).mean(1).tolist()
        rows.append(
            {"weights": kind, "bytes": nbytes, "kl": kl, "top1": same,
             "perplexity_ratio": float(torch.tensor(worse).exp())}
        )  # fmt: skip
    return rows


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters, those that are shared counted once, and what they are made of."""
    return sum(plain.nbytes for p in model.parameters() for plain in tensors_inside(p))


def _predictions(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities [T - 1, vocabulary] in float32."""
    logits: Tensor = model(ids, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def _compare(reference: Tensor, found: Tensor, target: Tensor) -> Tensor:
    """[3, T - 1]: divergence, whether the likeliest token is the same, how much likelier the text
    was, in nats."""
    kl = (reference.exp() * (reference - found)).sum(-1)
    same = (reference.argmax(-1) == found.argmax(-1)).float()
    worse = (reference - found).gather(-1, target[:, None])[:, 0]
    return torch.stack([kl, same, worse])
