"""Quote continuation: the words of the text that follow those which are quoted."""

from __future__ import annotations

from random import Random

from transformers import PreTrainedTokenizerBase

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.haystack import decode, encode, opening
from arkv_fx.evaluation.tasks.task import Asked, Sample, Scored, Task, Turn

BEFORE = "\n\nAs the text above says:"
CUE, ANSWER = 24, 10
"""Tokens that are quoted, and that are to follow."""


class Quotation(Task):
    """The document is the text, its lines joined, and the quoted tokens stand in it once."""

    name = "quote"
    help = "how a passage of the text goes on"
    asked = Asked.in_prompt
    scored = Scored.tokens

    def make(
        self, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, random: Random
    ) -> Sample:
        """See ``Task.make``."""
        start, before = opening(tokenizer), encode(tokenizer, BEFORE)
        room = tokens - len(start) - len(before) - CUE
        hay = encode(tokenizer, " ".join(text.split()))[: max(room, 0)]
        if len(hay) < max(room, 2 * (CUE + ANSWER)):
            raise EvaluationError(
                f"a passage of a text of {len(hay)} tokens cannot be quoted at {tokens} tokens: "
                "give a longer text, which is not repeated here, or more tokens"
            )
        places = list(range(len(hay) // 10, len(hay) - CUE - ANSWER))
        random.shuffle(places)
        for at in places:
            cue, answer = hay[at : at + CUE], hay[at + CUE : at + CUE + ANSWER]
            begins = decode(tokenizer, cue)[:1].isspace()  # not in the middle of a word
            if begins and _times(cue, hay) == 1:
                turn = Turn([*before, *cue], (decode(tokenizer, answer),), answer)
                return Sample([*start, *hay], [turn])
        raise EvaluationError("no passage of the text stands in it once: give another text")


def _times(part: list[int], whole: list[int]) -> int:
    return sum(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


QUOTATION = Quotation()
