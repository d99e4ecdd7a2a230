"""Passkey prompts and rows."""

from typing import Any

import pytest
import torch
from tiny_model import tokenizer

from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.passkey import FILLERS, PLACES, QUESTIONS, is_hit, make_prompt, passkey
from arkv_fx.evaluation.shared_prefill import Contest
from arkv_fx.models import load, random_model

SCHEMA = [
    "model", "filler", "question", "keys", "after", "context", "method", "compression", "correct",
    "total",
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
        assert text.endswith(question.format(of=""))
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


def test_several_keys_are_asked_for_in_turn() -> None:
    tok, wanted = tokenizer(), []
    for index in range(4):
        prompt = make_prompt(tok, "prose", QUESTIONS[0], 3000, index, keys=4)
        text = tok.decode(prompt.ids)
        assert len(prompt.ids) == 3000
        end = text[-prompt.asked :]
        place = end.removeprefix("\n\nThe pass key of ").removesuffix(" is")
        assert f"The pass key of {place} is {prompt.key}. " in text
        assert sum(f" is the pass key of {other}. " in text for other in PLACES) == 4
        wanted.append(place)
    assert wanted == list(PLACES[:4])


def test_asked_behind_the_text_what_is_kept_does_not_know_the_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prefill ends where the question begins, which each cache is given as it is then."""
    fed: list[tuple[str, int]] = []
    prefill, step = Contest.prefill, Contest.step

    def prefilled(self: Contest, ids: torch.Tensor, *args: Any) -> Any:
        fed.append(("prefill", ids.shape[1]))
        return prefill(self, ids, *args)

    def stepped(self: Contest, name: str, ids: torch.Tensor, *args: Any) -> Any:
        fed.append((name, ids.shape[1]))
        return step(self, name, ids, *args)

    monkeypatch.setattr(Contest, "prefill", prefilled)
    monkeypatch.setattr(Contest, "step", stepped)
    model = random_model("llama", vocab_size=256, num_hidden_layers=1)
    rows = passkey(
        model, tokenizer(), contexts=(320,), methods=["full"], prompts=1, fillers=["repeated"],
        after=True,
    )  # fmt: skip
    assert all(row["after"] for row in rows)
    asked = [len(question.format(of="")) for question in QUESTIONS]
    longer = [(name, size) for name, size in fed if size > 1]
    assert longer == [entry for n in asked for entry in (("prefill", 320 - n), ("full@320", n))]


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
        (context, len(question.format(of="")), method)
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
    assert [len(tok(q.format(of="")).input_ids) for q in QUESTIONS] == [6, 34]
    rows = passkey(model, tok, contexts=(1024,), methods=["full"], prompts=2, fillers=["repeated"])
    assert all(row["correct"] == 2 for row in rows)
