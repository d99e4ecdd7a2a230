"""Passkeys in a text: one, or one of several, asked for in the prompt or when it is compressed."""

from __future__ import annotations

from random import Random

from transformers import PreTrainedTokenizerBase

from arkv_fx.evaluation.haystack import DEPTHS, numbers, surround
from arkv_fx.evaluation.passkey import END, NEEDLE, PLACES
from arkv_fx.evaluation.tasks.task import Asked, Sample, Task, Turn


class PassKeys(Task):
    """``keys`` numbers of as many places; one is asked for in the prompt, or behind it each."""

    def __init__(self, name: str, help: str, keys: int, asked: Asked) -> None:
        self.name, self.help, self.keys, self.asked = name, help, keys, asked

    def make(
        self, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, random: Random
    ) -> Sample:
        """See ``Task.make``."""
        digits = numbers(random, text, self.keys)
        places = [f" of {place}" for place in PLACES] if self.keys > 1 else [""]
        whose = random.sample(places, self.keys)
        pairs = list(zip(whose, digits, strict=True))
        needles = [NEEDLE.format(of=of, key=key) for of, key in pairs]
        depths = random.sample(DEPTHS, self.keys)
        turns = [Turn.of(tokenizer, END.format(of=of), key) for of, key in pairs]
        if self.asked is Asked.in_prompt:
            turns = [random.choice(turns)]
            tokens -= len(turns[0].question)
        return Sample(surround(tokenizer, text, tokens, needles, depths), turns)


PASSKEY = PassKeys("passkey", "five digits hidden in a text", 1, Asked.in_prompt)
NEEDLES = PassKeys("needles", "one of four numbers hidden in a text", 4, Asked.in_prompt)
NEEDLES_AFTER = PassKeys(
    "needles-after",
    "four numbers hidden in a text, each asked for when the text is compressed",
    4,
    Asked.on_copies,
)
