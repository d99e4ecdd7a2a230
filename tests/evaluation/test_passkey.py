"""Passkey prompts and rows."""

import pytest
import torch
from tiny_model import tokenizer

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.passkey import FILLERS, QUESTIONS, is_hit, make_prompt, passkey
from arkv_fx.models import load, random_model

SCHEMA = [
    "model", "filler", "question", "context", "method", "compression", "correct", "total",
]  # fmt: skip


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_prompts_have_the_length_the_key_and_the_question(filler: str, question: str) -> None:
    tok = tokenizer()
    places = []
    for index in range(10):
        prompt = make_prompt(tok, filler, question, 3000, index)
        text = tok.decode(prompt.ids)
        assert len(prompt.ids) == 3000
        assert prompt.key.isdigit() and len(prompt.key) == 5
        assert text.count(prompt.key) == 2
        assert text.endswith(question)
        before = text.index(f" The pass key is {prompt.key}")
        assert text[before - 1] == "."
        places.append(before / 3000)
    # Depths cycle; the key stands behind the end of a sentence.
    assert places == pytest.approx([0.1 * (1 + i % 9) for i in range(10)], abs=0.2)


def test_prompts_are_reproducible_and_differ() -> None:
    first, again, other = (
        make_prompt(tokenizer(), "prose", QUESTIONS[0], 500, i) for i in (0, 0, 1)
    )
    assert torch.equal(first.ids, again.ids)
    assert other.key != first.key


def test_hits() -> None:
    assert is_hit(" 4 8213. Remember", "48213")
    assert not is_hit(" 48231", "48213")


def test_rows_on_a_tiny_model() -> None:
    methods = ["full", "evict:window=8"]
    model = random_model("llama", vocab_size=256, num_hidden_layers=1)
    rows = passkey(
        model, tokenizer(), contexts=(320, 400), methods=methods, prompts=3, batch=2,
        fillers=["repeated"], name="tiny",
    )  # fmt: skip
    assert all(list(row) == SCHEMA for row in rows)
    assert [(r["context"], r["question"], r["method"]) for r in rows] == [
        (context, len(question), method)
        for context in (320, 400)
        for question in QUESTIONS
        for method in methods
    ]
    assert all(0 <= row["correct"] <= row["total"] == 3 for row in rows)
    assert not hasattr(model, "arkv")


def test_refusals() -> None:
    tok = tokenizer()
    with pytest.raises(EvaluationError, match="leaves no room"):
        make_prompt(tok, "prose", QUESTIONS[0], 64, 0)
    with pytest.raises(EvaluationError, match="choose one of repeated, prose"):
        make_prompt(tok, "noise", QUESTIONS[0], 640, 0)


@pytest.mark.slow
def test_smollm2_counts_6_and_34_tokens_and_finds_the_key() -> None:
    model, tok = load("smollm2")
    assert [len(tok(q).input_ids) for q in QUESTIONS] == [6, 34]
    rows = passkey(model, tok, contexts=(1024,), methods=["full"], prompts=2, fillers=["repeated"])
    assert all(row["correct"] == 2 for row in rows)
