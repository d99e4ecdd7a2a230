"""Many-shot classification: words with the labels of their kinds, and then other words."""

from __future__ import annotations

from random import Random

from transformers import PreTrainedTokenizerBase

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.haystack import encode, opening
from arkv_fx.evaluation.tasks.task import Asked, Sample, Scored, Task, Turn

KINDS = (
    "fox bear horse goat sheep wolf rabbit tiger lion camel eagle shark whale frog snake "
    "donkey monkey zebra duck goose",
    "apple pear plum peach grape lemon orange banana cherry melon mango fig lime apricot "
    "strawberry raspberry pineapple papaya coconut kiwi",
    "iron copper gold silver tin lead zinc nickel steel brass bronze aluminium titanium "
    "platinum chromium cobalt mercury tungsten magnesium uranium",
    "France Spain Egypt Kenya India China Japan Brazil Chile Peru Canada Mexico Norway "
    "Sweden Poland Greece Turkey Cuba Nepal Portugal",
)
"""Animals, fruits, metals and countries."""
LABELS = ("blue", "north", "seven", "music", "paper", "winter", "left", "round")
"""What they are called in a document: which is which can be learned there alone."""
ASKED = 4
"""Words that are asked for, one at a time."""


class ManyShot(Task):
    """Lines in any order, repeated where there is room for more; asked of the compressed list."""

    name = "many-shot"
    help = "the label of a word, by a list of others that is compressed"
    asked = Asked.on_copies
    scored = Scored.tokens

    def make(
        self, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, random: Random
    ) -> Sample:
        """See ``Task.make``; of the text nothing is used."""
        labels = random.sample(LABELS, len(KINDS))
        pairs = [(w, x) for x, words in zip(labels, KINDS, strict=True) for w in words.split()]
        random.shuffle(pairs)
        wanted, shots = pairs[:ASKED], pairs[ASKED:]
        document = opening(tokenizer)
        before = len(document)
        while True:
            word, label = random.choice(shots)
            line = encode(tokenizer, f"{word} -> {label}\n")
            if len(document) + len(line) > tokens:
                break
            document += line
        if len(document) == before:
            raise EvaluationError(f"{tokens} tokens hold no line of a list")
        return Sample(document, [Turn.of(tokenizer, f"{w} ->", label) for w, label in wanted])


MANY_SHOT = ManyShot()
