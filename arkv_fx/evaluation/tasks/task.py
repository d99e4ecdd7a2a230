"""What a task is: a document that answers hang on, and the questions that ask for them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from transformers import PreTrainedTokenizerBase

from arkv_fx.evaluation.haystack import encode


class Asked(StrEnum):
    """When a question comes."""

    in_prompt = "in the prompt"
    """At its end: the cache is compressed knowing what is asked."""
    on_copies = "of copies"
    """When the document is in the cache; each question goes to a copy of that one cache."""
    in_turn = "in turn"
    """When the document is in the cache, behind the questions and answers before it."""


class Scored(StrEnum):
    """What part of an answer is right."""

    contains = "contains"
    """The share of the expected strings that stand in the answer, as RULER scores: case and spaces
    do not count, nor what else stands there."""
    tokens = "tokens"
    """The share of the expected tokens that stand at their own places."""


@dataclass(frozen=True)
class Turn:
    """A question's token ids, and what answers it: ``expected`` strings, in ``tokens``."""

    question: list[int]
    expected: tuple[str, ...]
    tokens: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, question: str, *expected: str) -> Turn:
        """A question in words."""
        answer = encode(tokenizer, " " + " ".join(expected))
        return cls(encode(tokenizer, question), expected, answer)


@dataclass(frozen=True)
class Sample:
    """The token ids of a document and the turns that follow; a single one if asked in the prompt.

    A document and the question of a prompt that holds both have at most as many tokens together
    as were asked for; else the document alone has.
    """

    document: list[int]
    turns: list[Turn]


class Task(ABC):
    """One task; an object of a subclass in the list ``TASKS`` is all that a new one takes."""

    name: str
    help: str
    asked: Asked
    scored: Scored = Scored.contains

    @abstractmethod
    def make(
        self, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, random: Random
    ) -> Sample:
        """A sample of ``tokens`` tokens, made of ``text`` and of what ``random`` draws.

        Equal arguments give equal samples.

        Raises:
            EvaluationError: if the text or the number of tokens is too small for the task.
        """

    def score(self, turn: Turn, answer: str, tokens: Sequence[int]) -> float:
        """How right an answer is, from 0 to 1; ``answer`` is what ``tokens`` mean."""
        if self.scored is Scored.tokens:
            pairs = zip(turn.tokens, tokens, strict=False)
            return sum(a == b for a, b in pairs) / len(turn.tokens)
        said = _plain(answer)
        return sum(_plain(text) in said for text in turn.expected) / len(turn.expected)


def _plain(text: str) -> str:
    return re.sub(r"\s+", "", text).lower()
