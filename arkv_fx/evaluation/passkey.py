"""Passkey retrieval: five digits hidden in a long text, asked for at its end or behind it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from arkv_fx import texts
from arkv_fx.calibration import Calibration
from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.calibrations import calibrations
from arkv_fx.evaluation.haystack import DEPTHS, encode, surround
from arkv_fx.evaluation.methods import FullCache, Setting, make_config
from arkv_fx.evaluation.results import Row
from arkv_fx.evaluation.shared_prefill import Contest

DEFAULT_METHODS = ("full", "evict", "uniform-int4", "paper-512", "paper-1024", "default")
FILLERS = ("repeated", "prose")
SENTENCES = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
NEEDLE = " The pass key{of} is {key}. Remember it. {key} is the pass key{of}. "
END = "\n\nThe pass key{of} is"
# 6 and 34 tokens for SmolLM2's tokenizer; the longer one fills a window of 32 queries.
QUESTIONS = (
    END,
    "\n\nYou have now read the whole text. Somewhere in it a pass key was given. "
    "Say which one, in digits only." + END,
)
PLACES = ("Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Paris", "Quito", "Dakar")
"""Whose pass keys they are, where a text has several."""
STEPS = 7
"""Tokens generated after the first, which comes from the prefill: a space and digits."""


@dataclass(frozen=True)
class Prompt:
    """``ids`` [T] int64 ending in a question of ``asked`` tokens, and the digits that answer it."""

    ids: Tensor
    key: str
    asked: int


def make_prompt(
    tokenizer: PreTrainedTokenizerBase, filler: str, question: str, context: int, index: int,
    keys: int = 1,
) -> Prompt:  # fmt: skip
    """Prompt number ``index`` of exactly ``context`` tokens; depths, texts and keys cycle.

    Raises:
        EvaluationError: if the context does not hold the question and the keys, or there are more
            keys than places to name them by.
    """
    if not 1 <= keys <= len(PLACES):
        raise EvaluationError(f"keys={keys}: a text holds 1 to {len(PLACES)}")

    chance = random.Random(index)
    digits = [str(chance.randint(10000, 99999)) for _ in range(keys)]
    of = [f" of {place}" for place in PLACES[:keys]] if keys > 1 else [""]
    needles = [NEEDLE.format(key=key, of=whose) for key, whose in zip(digits, of, strict=True)]
    wanted = index % keys
    end = encode(tokenizer, question.format(of=of[wanted]))
    # The keys of a text go in turn to all depths.
    step = len(DEPTHS) / keys
    depths = [DEPTHS[int(index + step * i) % len(DEPTHS)] for i in range(keys)]
    hay = surround(tokenizer, _haystack(filler, index), context - len(end), needles, depths)
    return Prompt(torch.tensor([*hay, *end]), digits[wanted], len(end))


def _haystack(filler: str, index: int) -> str:
    if filler == "repeated":
        return SENTENCES
    if filler != "prose":
        raise EvaluationError(f"filler {filler!r}: choose one of {', '.join(FILLERS)}")
    names = texts.names()
    return texts.read(names[index % len(names)])


def passkey(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    contexts: Sequence[int] = (2048, 4096),
    methods: Sequence[str] = DEFAULT_METHODS,
    prompts: int = 20,
    compression: float = 4.0,
    fillers: Sequence[str] = FILLERS,
    calibration: Calibration | None = None,
    batch: int = 5,
    keys: int = 1,
    after: bool = False,
    name: str = "",
    compile: str = "eager",
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Greedy answers of every method to the same prompts; a hit has all five digits in order.

    Args:
        model: a causal language model that is not transformed, in eval mode.
        contexts: prompt lengths in tokens, question included.
        prompts: prompts for each filler, question and context.
        compression: bytes of a bf16 cache at the context divided by those allowed.
        calibration: used by the methods that take one; None: they are calibrated as
            ``transform(model)`` does it by itself, on the first prompts of prose.
        batch: prompts that run at a time.
        keys: pass keys in a text, of as many places; a prompt asks for one of them.
        after: the question comes when the text is in the cache: what is kept was chosen without it.

    Returns:
        One row per filler, question (its length in tokens with one key), context and method with
        ``correct`` of ``total`` prompts.

    Raises:
        EvaluationError: for a context that is too short or a filler that does not exist.
        ConfigError: for a method or size that cannot work.
    """
    for filler in fillers:
        _haystack(filler, 0)
    full = FullCache.of(model)
    device = next(model.parameters()).device
    methods, batch = list(dict.fromkeys(methods)), min(batch, prompts)
    configs = {
        f"{method}@{context}": make_config(
            method, Setting(context, STEPS, int(full.per_layer(context) / compression), full.exact)
        )
        for context in contexts
        for method in methods
    }
    filler = "prose" if "prose" in fillers else fillers[0]  # what repeats itself tells nothing
    first = [
        make_prompt(tokenizer, filler, QUESTIONS[0], contexts[0], i, keys) for i in range(batch)
    ]
    by_entry = calibrations(
        model, torch.stack([p.ids for p in first]).to(device), configs,
        {entry: entry.rpartition("@")[0] for entry in configs}, calibration,
    )  # fmt: skip
    rows: list[Row] = []
    with Contest(model, configs, by_entry, compile=compile) as contest:
        for context in contexts:
            names = [f"{method}@{context}" for method in methods]
            for filler in fillers:
                for question in QUESTIONS:
                    made = [
                        make_prompt(tokenizer, filler, question, context, i, keys)
                        for i in range(prompts)
                    ]
                    asked = len(encode(tokenizer, question.format(of="")))
                    hits = dict.fromkeys(names, 0)
                    for start in range(0, prompts, batch):
                        progress(
                            f"{context} tokens, {filler}, question of {asked}: "
                            f"prompts {start + 1} to {min(start + batch, prompts)}"
                        )
                        part = made[start : start + batch]
                        found = _answer(contest, names, part, batch, tokenizer, device, after)
                        for method, hit in found:
                            hits[method] += hit
                    for method, key in zip(methods, names, strict=True):
                        rows.append(
                            {
                                "model": name,
                                "filler": filler,
                                "question": asked,
                                "keys": keys,
                                "after": after,
                                "context": context,
                                "method": method,
                                "compression": compression,
                                "correct": hits[key],
                                "total": prompts,
                            }
                        )
    return rows


def _answer(
    contest: Contest,
    names: Sequence[str],
    prompts: Sequence[Prompt],
    batch: int,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    after: bool,
) -> list[tuple[str, int]]:
    """(method, hits) over ``prompts``, which are filled up to ``batch`` with the last one.

    A graph is made for one batch size, so a smaller last batch would be traced anew.
    """
    filled = [*prompts, *[prompts[-1]] * (batch - len(prompts))]
    ids = torch.stack([p.ids for p in filled]).to(device)
    whole = ids.shape[1] - (_shared_end(filled) if after else 0)
    logits, caches = contest.prefill(ids[:, :whole], names)
    out = []
    for name in names:
        cache = caches.pop(name)
        if after:
            logits = contest.step(name, ids[:, whole:], cache)
        tokens = [logits.argmax(-1, keepdim=True)]
        for _ in range(STEPS):
            tokens.append(contest.step(name, tokens[-1], cache).argmax(-1, keepdim=True))
        answers = tokenizer.batch_decode(torch.cat(tokens, -1)[: len(prompts)])
        hit = [is_hit(text, p.key) for text, p in zip(answers, prompts, strict=True)]
        out.append((name, sum(hit)))
    return out


def _shared_end(prompts: Sequence[Prompt]) -> int:
    """Tokens at the end of each that ask; a place may be one token or more."""
    return min(prompt.asked for prompt in prompts)


def is_hit(answer: str, key: str) -> bool:
    """Whether the key's digits stand in the answer one after the other, spaces ignored."""
    return key in re.sub(r"\s+", "", answer)
