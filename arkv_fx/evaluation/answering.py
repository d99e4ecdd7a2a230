"""What each method answers to one sample: the document is read once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from arkv_fx.evaluation.haystack import decode
from arkv_fx.evaluation.shared_prefill import Contest
from arkv_fx.evaluation.tasks import Asked, Sample, Task, Turn
from arkv_fx.huggingface.cache import ArkvCache

MORE = 3
"""Tokens that an answer may have beyond those expected: a space, quotes, "it is"."""


@dataclass(frozen=True)
class Answers:
    """Of one method to one sample: token ids of the answer to each turn, and the cache's bytes."""

    tokens: list[list[int]]
    nbytes: int


def length(sample: Sample) -> int:
    """Tokens that a cache meets at most beyond the document."""
    return sum(len(t.question) + len(t.tokens) + MORE for t in sample.turns)


def answer(
    contest: Contest, names: Sequence[str], task: Task, sample: Sample, device: torch.device
) -> dict[str, Answers]:
    """Greedy answers of the methods ``names``, after one prefill that they share.

    As in ``generate()`` the first token after a prefill comes from the full attention of the
    prefill. A question that comes later is read through what the cache holds by then, and so is
    every token of its answer.
    """
    in_prompt = task.asked is Asked.in_prompt
    prompt = [*sample.document, *(sample.turns[0].question if in_prompt else [])]
    logits, caches = contest.prefill(_ids(prompt, device), names)
    found = {}
    for name in names:
        cache = caches.pop(name)
        said: list[list[int]] = []
        for turn in sample.turns:
            mine = copy.deepcopy(cache) if task.asked is Asked.on_copies else cache
            first = logits
            if not in_prompt:
                last = said[-1][-1:] if said and task.asked is Asked.in_turn else []  # not fed yet
                first = contest.step(name, _ids([*last, *turn.question], device), mine)
            said.append(_go_on(contest, name, mine, first, len(turn.tokens) + MORE))
            nbytes = mine.nbytes()
        found[name] = Answers(said, nbytes)
    return found


def rate(
    task: Task, sample: Sample, given: Answers, tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """How right the answer to each turn is, from 0 to 1; it ends where the model ends a text."""
    out = []
    for turn, tokens in zip(sample.turns, given.tokens, strict=True):
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        out.append(task.score(turn, decode(tokenizer, tokens), tokens))
    return out


def agree(turns: Sequence[Turn], one: Answers, other: Answers) -> list[bool]:
    """Whether two methods gave the same tokens to each turn, as many as were expected."""
    return [
        a[: len(turn.tokens)] == b[: len(turn.tokens)]
        for turn, a, b in zip(turns, one.tokens, other.tokens, strict=True)
    ]


def _go_on(contest: Contest, name: str, cache: ArkvCache, logits: Tensor, count: int) -> list[int]:
    tokens = [int(logits.argmax(-1))]
    while len(tokens) < count:
        logits = contest.step(name, _ids(tokens[-1:], logits.device), cache)
        tokens.append(int(logits.argmax(-1)))
    return tokens


def _ids(tokens: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([list(tokens)], device=device)
