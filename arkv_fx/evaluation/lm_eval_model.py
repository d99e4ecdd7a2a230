"""lm-eval's model ``arkv``: generation and log-likelihood through the compressed cache.

lm-eval 0.4 finds models in a list of its own and asks no entry points, so its command is called by
this module, which adds the model to that list first::

    python -m arkv_fx.evaluation.lm_eval_model run --model arkv \\
        --model_args pretrained=smollm2,compression=4 --tasks TASK
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from arkv_fx import models
from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig, preset
from arkv_fx.errors import EvaluationError, UnknownOptionError
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.transforming import transform

OPTIONS = ("compression", "context", "budget", "bytes", "tiers", "balance", "window",
           "window_format", "sinks", "oq_ratio", "eviction_share", "score", "round_to")  # fmt: skip
"""Options of ``ArkvConfig`` that a model argument may set; tiers are joined by ``+``."""
Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What lm-eval keeps an answer by, and the tokens of a context and of its continuation."""


@register_model("arkv")
class ArkvLM(HFLM):  # type: ignore[misc]
    """A causal model of transformers under an ARKV cache.

    Log-likelihoods are those of generation: all of a context but its last token is read as a
    prompt and compressed; that token and the continuation are then read through what the cache
    holds, ``chunk`` tokens at a time. So each token that is scored is predicted by the small cache.

    Args:
        pretrained: a transformers id, a folder, ``smollm2``, ``gemma3-270m``, or a model.
        chunk: tokens of a continuation that are read at once; 1: token by token, as generation
            does; 0: all of them, so that only the context is compressed.
        calibration: a file of ``arkv calibrate``, ``none`` for the plain plan of all layers, or
            nothing: as ``transform(model)`` does by itself.
        preset: of the configuration.
        compile: as for ``arkv_fx.transform``.
        kwargs: those of ``OPTIONS``, and of lm-eval's ``hf``.

    Raises:
        EvaluationError: for a batch size that is not a number.
        ConfigError: for options that cannot work.
    """

    def __init__(
        self,
        pretrained: Any,
        chunk: int = 32,
        calibration: str | Path | Calibration | None = None,
        preset: str = "default",
        compile: str = "eager",
        **kwargs: Any,
    ) -> None:
        config = configure(preset, {n: kwargs.pop(n) for n in OPTIONS if n in kwargs})
        known = inspect.signature(HFLM.__init__).parameters
        if unknown := [name for name in kwargs if name not in known]:
            raise UnknownOptionError(
                f"model arguments {', '.join(unknown)} are unknown; known are chunk, calibration, "
                f"preset, compile, {', '.join(OPTIONS)}, and those of the model hf"
            )
        if not str(kwargs.get("batch_size") or 1).isdigit():
            raise EvaluationError(
                f"batch_size={kwargs['batch_size']}: give a number; what is tried out for "
                "'auto' is one forward without a cache"
            )
        if not isinstance(chunk, int) or chunk < 0:
            raise EvaluationError(f"chunk={chunk!r}: give a number of tokens, 0 for all")
        if isinstance(pretrained, str) and pretrained in models.PACKAGED:
            dtype = kwargs.get("dtype", torch.float32)
            dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            pretrained, kwargs["tokenizer"] = models.load(
                pretrained, dtype, kwargs.get("device") or "cpu"
            )
        super().__init__(pretrained=pretrained, **kwargs)
        found: Calibration | Literal[False] | None = None
        if isinstance(calibration, Calibration):
            found = calibration
        elif calibration is not None:
            found = False if str(calibration) == "none" else Calibration.load(calibration)
        self.chunk = chunk
        transform(self.model, config, found, compile=compile)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability, and whether it is the likeliest.

        Rows of a batch have continuations of one length; shorter contexts are padded on the left.
        """
        groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            groups[len(continuation), len(context) > 1].append(index)
        answers: dict[int, tuple[float, bool]] = {}
        size = override_bs or int(self.batch_size)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0)
        for same in groups.values():
            same.sort(key=lambda index: -len(requests[index][1]))
            for start in range(0, len(same), size):
                part = same[start : start + size]
                pairs = [self._cut(*requests[index][1:]) for index in part]
                for index, answer in zip(part, self._score(pairs), strict=True):
                    answers[index] = answer
                    if (name := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", name, answer)
                    bar.update(1)
        bar.close()
        return [answers[index] for index in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The last tokens, as many as the model has positions for and one to predict.

        Raises:
            EvaluationError: if a continuation alone has more.
        """
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise EvaluationError(
                f"a continuation of {len(continuation)} tokens: the model takes {self.max_length}; "
                "give shorter ones, or a larger max_length"
            )
        return context[-room:], continuation

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of pairs of contexts and continuations, the latter of one length."""
        continuations = torch.tensor([c for _, c in pairs], device=self.device)
        # A context of one token is all of the prompt; else the last waits for the compression.
        wait = int(min(len(context) for context, _ in pairs) > 1)
        prompts = [context[: len(context) - wait] for context, _ in pairs]
        ids, mask = _left_padded(prompts, self.tokenizer.pad_token_id or 0, self.device)
        cache = ArkvCache(self.model)
        logits = [self._forward(cache, ids, mask, 1)]
        rest = continuations[:, :-1]
        if wait:
            last = torch.tensor([c[-1:] for c, _ in pairs], device=self.device)
            rest, logits = torch.cat([last, rest], 1), []
        for part in rest.split(self.chunk or max(rest.shape[1], 1), 1) if rest.numel() else ():
            mask = torch.cat([mask, torch.ones_like(part)], 1)
            logits.append(self._forward(cache, part, mask, part.shape[1]))
        found = torch.cat(logits, 1).log_softmax(-1, dtype=self.softmax_dtype)
        each = found.gather(-1, continuations[..., None])[..., 0].sum(1)
        greedy = (found.argmax(-1) == continuations).all(1)
        return list(zip(each.tolist(), greedy.tolist(), strict=True))

    def _forward(self, cache: ArkvCache, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Logits [B, keep, vocabulary] of the last tokens of ``ids``, which the cache takes in."""
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache,
            use_cache=True, logits_to_keep=keep,
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits


def configure(name: str, options: Mapping[str, Any]) -> ArkvConfig:
    """The configuration ``name`` with options as they stand in ``--model_args``."""
    changes = dict(options)
    if isinstance(tiers := changes.get("tiers"), str):
        changes["tiers"] = tuple(tiers.split("+"))
    return preset(name).replace(**changes)


def _left_padded(
    rows: Sequence[list[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] with ``pad`` before the shorter rows, and their mask [B, T]."""
    most = max(map(len, rows))
    ids = [[pad] * (most - len(row)) + row for row in rows]
    mask = [[0] * (most - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
