"""Key-value lookup: a long list of words and numbers, one of which is asked for."""

from __future__ import annotations

import re
from random import Random

from transformers import PreTrainedTokenizerBase

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.haystack import encode, numbers, opening
from arkv_fx.evaluation.tasks.task import Asked, Sample, Task, Turn

BEFORE = "Each name has a number:\n\n"
LINE = "The number of {key} is {value}.\n"
QUESTION = "\nThe number of {key} is"


class KeyValues(Task):
    """As many lines as there is room for; the names are two words of the text each."""

    name = "key-values"
    help = "a number in a list, by its name"
    asked = Asked.in_prompt

    def make(
        self, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, random: Random
    ) -> Sample:
        """See ``Task.make``."""
        words = sorted(set(re.findall(r"[^\W\d_]{4,9}", text.lower())))
        if len(words) ** 2 < 4 * tokens:
            raise EvaluationError(
                f"the text has {len(words)} different words, too few to name the lines of a list "
                f"of {tokens} tokens: give a longer text"
            )
        list_ = [*opening(tokenizer), *encode(tokenizer, BEFORE)]
        longest = 0
        pairs: dict[str, str] = {}
        for value in numbers(random, "", tokens // 8):
            key = " ".join(random.sample(words, 2))
            line = encode(tokenizer, LINE.format(key=key, value=value))
            longest = max(longest, len(encode(tokenizer, QUESTION.format(key=key))))
            if len(list_) + len(line) + longest > tokens:
                break
            if key not in pairs:
                pairs[key] = value
                list_ += line
        if len(pairs) < 2:
            raise EvaluationError(f"{tokens} tokens hold no list with a choice")
        key, value = random.choice(list(pairs.items()))
        return Sample(list_, [Turn.of(tokenizer, QUESTION.format(key=key), value)])


KEY_VALUES = KeyValues()
