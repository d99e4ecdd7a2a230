"""Multi-turn recall: what a user said in the course of a long conversation, asked for in turn."""

from __future__ import annotations

from random import Random

from transformers import PreTrainedTokenizerBase

from arkv_fx.evaluation.haystack import numbers, surround
from arkv_fx.evaluation.tasks.task import Asked, Sample, Task, Turn

THINGS = ("locker", "ticket", "house", "room", "bank card", "bicycle", "parcel", "table")
FACTS = 3
SAID = (
    "\n\nUser: Please remember that the number of my {thing} is {number}.\n"
    "Assistant: The number of your {thing} is {number}.\n\nUser: Read on. "
)
QUESTION = "\n\nUser: What is the number of my {thing}?\nAssistant: The number of your {thing} is"


class Recall(Task):
    """Facts between passages of the text; the questions follow each other in one conversation."""

    name = "recall"
    help = "what a user said in a long conversation, in several turns"
    asked = Asked.in_turn

    def make(
        self, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, random: Random
    ) -> Sample:
        """See ``Task.make``."""
        things = random.sample(THINGS, FACTS)
        pairs = list(zip(things, numbers(random, text, FACTS), strict=True))
        said = [SAID.format(thing=thing, number=number) for thing, number in pairs]
        depths = sorted(random.sample(range(5, 91), FACTS))
        document = surround(tokenizer, text, tokens, said, depths, before="User: Read this. ")
        random.shuffle(pairs)
        return Sample(document, [Turn.of(tokenizer, QUESTION.format(thing=t), n) for t, n in pairs])


RECALL = Recall()
