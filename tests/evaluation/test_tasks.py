"""What every task's generator promises, and how answers are scored."""

from functools import cache
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from arkv_fx import texts
from arkv_fx.errors import EvaluationError, UnknownOptionError
from arkv_fx.evaluation.haystack import decode, encode, numbers, surround
from arkv_fx.evaluation.tasks import TASKS, Asked, Sample, Scored, Turn

TOKENIZER = tokenizer()  # a token a byte
TEXT = texts.read("moby_dick")
OTHER = "".join(f"def function_{i}(x):\n\treturn x * {i} # {i:b}\n" for i in range(900))
TIMES = {"passkey": 2, "needles": 2, "needles-after": 2, "recall": 2, "key-values": 1}
"""How often an answer stands in its document."""


@cache
def made(name: str, tokens: int, seed: int, text: str = TEXT) -> Sample:
    return TASKS[name].make(TOKENIZER, text, tokens, Random(seed))


each = pytest.mark.parametrize("name", TASKS)


@each
@given(tokens=st.integers(1500, 6000), seed=st.integers(0, 10**6))
def test_samples_are_as_long_as_asked_for_and_hold_their_answers(
    name: str, tokens: int, seed: int
) -> None:
    task, sample = TASKS[name], made(name, tokens, seed)
    document = decode(TOKENIZER, sample.document)
    in_prompt = task.asked is Asked.in_prompt
    assert len(sample.turns) == 1 if in_prompt else len(sample.turns) > 1
    whole = len(sample.document) + (len(sample.turns[0].question) if in_prompt else 0)
    assert tokens * 0.95 < whole <= tokens
    for turn in sample.turns:
        assert turn.question and turn.expected and turn.tokens
        if name in TIMES:
            assert [document.count(x) for x in turn.expected] == [TIMES[name]]
        # Whoever says what is expected, and nothing else, is right.
        assert task.score(turn, decode(TOKENIZER, turn.tokens), turn.tokens) == 1
        assert task.score(turn, "~", encode(TOKENIZER, "~")) == 0


@each
def test_a_sample_hangs_on_the_seed_alone(name: str) -> None:
    task = TASKS[name]
    again = task.make(TOKENIZER, TEXT, 2000, Random(3))
    assert again == made(name, 2000, 3) != made(name, 2000, 4)


@each
def test_any_text_will_do(name: str) -> None:
    """Code, without sentences and with few words; a list of names made of it is refused."""
    if name == "key-values":
        with pytest.raises(EvaluationError, match="too few to name the lines"):
            made(name, 2000, 0, OTHER)
    else:
        assert made(name, 2000, 0, OTHER).turns


@each
def test_too_few_tokens_are_refused(name: str) -> None:
    with pytest.raises(EvaluationError):
        TASKS[name].make(TOKENIZER, TEXT, 8, Random(0))


def test_a_text_is_not_repeated_to_be_quoted() -> None:
    with pytest.raises(EvaluationError, match="not repeated"):
        made("quote", 2000, 0, TEXT[:1000])


def test_a_chain_stands_in_order_and_the_example_has_another() -> None:
    sample = made("variables", 3000, 0)
    (turn,) = sample.turns
    document = decode(TOKENIZER, sample.document)
    places = [document.index(f"VAR {name} = ") for name in turn.expected]
    assert places == sorted(places) and len(places) == 5
    assert document.count(" VAR ") == 2 * (5 + 4)
    value = document[places[0] :].partition(" = ")[2][:5]
    assert value.isdigit() and f"value {value}, they are:" in decode(TOKENIZER, turn.question)


def test_classified_words_are_not_among_the_examples() -> None:
    sample = made("many-shot", 3000, 0)
    lines = decode(TOKENIZER, sample.document).splitlines()
    assert all(" -> " in line for line in lines)
    for turn in sample.turns:
        asked = decode(TOKENIZER, turn.question)
        assert not any(line.startswith(asked) for line in lines)
        assert f"-> {turn.expected[0]}" in "".join(lines)


@given(depths=st.lists(st.integers(0, 100), min_size=1, max_size=6), tokens=st.integers(200, 900))
def test_what_is_hidden_stays_whole(depths: list[int], tokens: int) -> None:
    """Also in a text without an end of a sentence, where two go to one place."""
    needles = [f"[needle {i}. No more.]" for i in range(len(depths))]
    found = surround(TOKENIZER, "words and words ", tokens, needles, depths)
    text = decode(TOKENIZER, found)
    assert len(found) == tokens
    assert all(text.count(needle) == 1 for needle in needles)
    order = sorted(range(len(depths)), key=lambda i: depths[i])
    assert [text.index(needles[i]) for i in order] == sorted(map(text.index, needles))


def test_numbers_do_not_stand_in_the_text() -> None:
    taken = " ".join(map(str, range(10000, 99990)))
    assert all(number >= "99990" for number in numbers(Random(0), taken, 10))


def test_scores() -> None:
    turn = Turn([1], ("ABCDE", "FGHIJ"), [1, 2, 3, 4])
    task = TASKS["variables"]
    assert task.scored is Scored.contains
    assert task.score(turn, "abc de, nothing", [9]) == 0.5
    quote = TASKS["quote"]
    assert quote.scored is Scored.tokens
    assert quote.score(turn, "ABCDE FGHIJ", [1, 9, 3]) == 0.5


def test_unknown_tasks_are_refused_by_name() -> None:
    with pytest.raises(UnknownOptionError, match="the tasks are passkey, needles, "):
        TASKS.find("niah")


def test_a_tokenizer_that_begins_texts_does_so_once() -> None:
    tok: PreTrainedTokenizerBase = tokenizer()
    assert made("passkey", 2000, 0).document[0] != TOKENIZER.bos_token_id
    tok.add_special_tokens({"bos_token": "<s>"})
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.bos_token_id)])
    tok._tokenizer.post_processor = begins
    for task in TASKS.values():
        sample = task.make(tok, TEXT, 2000, Random(0))
        assert sample.document[0] == tok.bos_token_id
        assert tok.bos_token_id not in sample.document[1:]
        assert all(tok.bos_token_id not in turn.question for turn in sample.turns)
