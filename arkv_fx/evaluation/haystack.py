"""A text of so many tokens, and what is hidden in it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from transformers import PreTrainedTokenizerBase

from arkv_fx.errors import EvaluationError

DEPTHS = tuple(range(10, 100, 10))
"""Where something is hidden, in percent of the text."""
LEAST_ROOM = 32
"""Tokens of text around what is hidden; with fewer there is nothing to find it in."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a piece of a text, without those that begin or end one."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of one sequence of tokens."""
    return str(tokenizer.decode(list(tokens)))


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that begins every text, if the tokenizer sets one."""
    first = [] if tokenizer.bos_token_id is None else tokenizer("a").input_ids[:1]
    return [token for token in first if token == tokenizer.bos_token_id]


def surround(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: int,
    needles: Sequence[str],
    depths: Sequence[int],
    before: str = "",
) -> list[int]:
    """Exactly ``tokens`` token ids: ``before``, then ``text`` with the needles in it.

    The text is repeated as often as it takes. Each needle goes behind the next end of a sentence.

    Args:
        depths: of each needle, in percent of the text.

    Raises:
        EvaluationError: if so few tokens leave no room for a text around the needles.
    """
    start = [*opening(tokenizer), *encode(tokenizer, before)]
    hidden = [encode(tokenizer, needle) for needle in needles]
    room = tokens - len(start) - sum(map(len, hidden))
    hay = encode(tokenizer, text)
    if room < LEAST_ROOM or not hay:
        raise EvaluationError(
            f"the length asked for leaves no room for a text around what is hidden in it: "
            f"{max(room, 0)} of {LEAST_ROOM} tokens, from a text of {len(hay)}"
        )
    hay = (hay * (room // len(hay) + 1))[:room]
    stop = encode(tokenizer, "The end.")[-1]
    cuts = []
    for depth in depths:
        cut = room * depth // 100
        cuts.append(hay.index(stop, cut) + 1 if stop in hay[cut:] else cut)
    places = sorted(zip(cuts, range(len(hidden)), strict=True), reverse=True)
    for cut, index in places:  # from the back; of two at one place the first stays first
        hay[cut:cut] = hidden[index]
    return [*start, *hay]


def numbers(random: Random, text: str, count: int) -> list[str]:
    """Different numbers of five digits that do not stand in ``text``."""
    found: list[str] = []
    while len(found) < count:
        number = str(random.randint(10000, 99999))
        if number not in found and number not in text:
            found.append(number)
    return found
