"""Runs of tasks: rows, resuming, and that a lost needle is seen."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tiny_model import save, tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

from arkv_fx import texts
from arkv_fx.cli import app
from arkv_fx.errors import EvaluationError, UnknownOptionError
from arkv_fx.evaluation import task_runs
from arkv_fx.evaluation.answering import MORE, answer
from arkv_fx.evaluation.fidelity import make_configs
from arkv_fx.evaluation.haystack import encode, surround
from arkv_fx.evaluation.methods import FullCache
from arkv_fx.evaluation.results import RowLog
from arkv_fx.evaluation.shared_prefill import Contest
from arkv_fx.evaluation.task_runs import SETTINGS, run_tasks
from arkv_fx.evaluation.tasks import TASKS, Asked, Sample, Task, Turn
from arkv_fx.models import random_model

TOKENIZER = tokenizer()
TEXTS = {"moby_dick": texts.read("moby_dick")}
SCHEMA = [
    "model", "dtype", "compile", "text", "calibration", "seed", "prompts", "task", "tokens",
    "method", "compression", "scored", "asked", "answers", "full_accuracy", "accuracy",
    "agreement", "bytes", "full_bytes",
]  # fmt: skip


class OneDigit(Task):
    """A newcomer: one digit in a text of letters, asked for by "?"."""

    name, help = "one-digit", "a digit"

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.name = f"one-digit-{asked.name}"

    def make(
        self, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, random: Random
    ) -> Sample:
        digit = str(random.randrange(10))
        letters = "".join(random.choices("abcdefgh", k=97))
        turn = Turn(encode(tokenizer, "?"), (digit,), encode(tokenizer, digit))
        room = tokens - (self.asked is Asked.in_prompt)
        depth = random.randrange(10, 60)
        turns = [turn] * (1 if self.asked is Asked.in_prompt else 2)
        return Sample(surround(tokenizer, letters, room, [digit], [depth]), turns)


@pytest.fixture
def one_digit() -> Iterator[list[str]]:
    names = [TASKS.add(OneDigit(asked)).name for asked in Asked]
    yield names
    for name in names:
        del TASKS[name]


def copying_model() -> PreTrainedModel:
    """Answers "?" by the digit that it attends to: the value of a digit's key is its name.

    One layer of one head. Queries are of "?" and of what was answered, and look for what is
    written in the dimensions that RoPE turns least; all others look everywhere.
    """
    model = random_model(
        "llama", vocab_size=256, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=32, hidden_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        inner: Any = model.model
        layer = inner.layers[0]
        embedding, head = inner.embed_tokens.weight, model.lm_head.weight
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, inner.norm):
            norm.weight.fill_(1.0)
        embedding[:, 63] = 1.0  # the norm has something to divide by
        (asks,) = encode(TOKENIZER, "?")
        embedding[asks, 1] = 1.0
        for digit in range(10):
            (token,) = encode(TOKENIZER, str(digit))
            embedding[token, 0] = 1.0
            embedding[token, 2 + digit] = 1.0
            layer.self_attn.v_proj.weight[digit, 2 + digit] = 1.0
            layer.self_attn.o_proj.weight[20 + digit, digit] = 8.0
            head[token, 20 + digit] = 1.0
        layer.self_attn.q_proj.weight[15, 1] = 8.0  # dimensions 15 and 31 turn together, slowly
        layer.self_attn.k_proj.weight[15, 0] = 8.0
    return model


def tiny(**changes: Any) -> Any:
    model = random_model("llama", vocab_size=256, num_hidden_layers=1, max_position_embeddings=4096)
    given = {
        "tasks": ["passkey", "needles-after"], "contexts": [900], "prompts": 2, "name": "tiny",
        "methods": ["full", "evict:window=8"], "compressions": [2.0, 4.0],
    } | changes  # fmt: skip
    return run_tasks(model, TOKENIZER, TEXTS, **given)


def test_rows_have_the_schema_and_every_entry_once(tmp_path: Path) -> None:
    said: list[str] = []
    rows = tiny(path=tmp_path / "rows.jsonl", progress=said.append)
    assert all(list(row) == SCHEMA for row in rows)
    entries = [("full", None), ("evict:window=8", 2.0), ("evict:window=8", 4.0)]
    assert [(r["task"], r["method"], r["compression"]) for r in rows] == [
        (task, *entry) for task in ("passkey", "needles-after") for entry in entries
    ]
    assert [row["answers"] for row in rows] == [2] * 3 + [8] * 3
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["agreement"] <= 1
        assert row["full_bytes"] == 900 * 2 * 32 * 2
        assert row["method"] == "full" or row["bytes"] <= row["full_bytes"] / row["compression"]
        if row["method"] == "full":
            assert row["agreement"] == 1 and row["accuracy"] == row["full_accuracy"]
    assert RowLog(tmp_path / "rows.jsonl", SETTINGS).rows == rows
    assert "left" in said[-1] and "needles-after, 900 tokens: prompt 2" in said[-1]


def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "rows.jsonl", tiny()
    measure, measured = task_runs._measure, list[str]()
    killed = True

    def measured_or_killed(contest: Contest, cell: Any, *args: Any) -> Any:
        if killed and cell.task.name == "needles-after":
            raise KeyboardInterrupt
        measured.append(cell.task.name)
        return measure(contest, cell, *args)

    monkeypatch.setattr(task_runs, "_measure", measured_or_killed)
    with pytest.raises(KeyboardInterrupt):
        tiny(path=path)
    first = path.read_text()
    assert RowLog(path, SETTINGS).rows == whole[:3]
    path.write_text(first + first.splitlines()[0][:40])  # and its last line was cut short
    killed = False
    with pytest.warns(RuntimeWarning, match="not written to the end"):
        assert tiny(path=path) == whole
    assert measured == ["passkey", "needles-after"]
    assert path.read_text().startswith(first)
    path.write_text(path.read_text()[:-1])  # a whole row, but for the end of its line
    # All is there: nothing is run. One more method: it alone is added.
    assert tiny(path=path) == whole and len(measured) == 2
    more = tiny(path=path, methods=["full", "uniform-int8:window=8"], compressions=[2.0])
    assert len(measured) == 4 and len(RowLog(path, SETTINGS).rows) == len(whole) + 2
    assert [row["method"] for row in more] == ["full", "uniform-int8:window=8"] * 2


@pytest.mark.parametrize("change", [{"seed": 1}, {"prompts": 1}, {"name": "other"}])
def test_rows_of_other_settings_are_kept_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    path, few = tmp_path / "rows.jsonl", {"tasks": ["passkey"], "methods": ["full"]}
    before = tiny(path=path, **few)
    after = tiny(path=path, **few, **change)
    assert RowLog(path, SETTINGS).rows == before + after
    assert before[0] != after[0]


@pytest.mark.parametrize(
    "text",
    [
        "[\n{}\n]",
        '{"a": [1]}\n',
        "nothing",
        "1\n",
        '{"name": "a file"}',
        "{ no end",
        '{"a": 1}\n',
        '{"a": 1}\nand notes',
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"lines of JSON|rows that have"):
        tiny(path=path)
    assert path.read_text() == text


def test_a_method_that_loses_the_digit_is_seen(one_digit: list[str]) -> None:
    """Two controls: what evicts it scores less, what only quantizes it answers as the full cache.

    Who is asked within the prompt looks at the digit, and keeps it.
    """
    rows = run_tasks(
        copying_model(), TOKENIZER, TEXTS, tasks=one_digit, contexts=[400], prompts=4,
        methods=["full", "evict:window=8,sinks=2", "uniform-int8:window=8,bytes=100000"],
        compressions=[8.0],
    )  # fmt: skip
    found = {(row["task"], row["method"].partition(":")[0]): row for row in rows}
    for name in one_digit:
        full, int8 = found[name, "full"], found[name, "uniform-int8"]
        assert full["accuracy"] == int8["accuracy"] == int8["agreement"] == 1
        evict = found[name, "evict"]
        assert evict["full_accuracy"] == 1
        assert (evict["accuracy"] == 1) == ("in_prompt" in name)
        assert (evict["agreement"] == 1) == ("in_prompt" in name)
    assert len(one_digit) == 3


def test_the_full_method_answers_as_generate_does() -> None:
    """Asked in the prompt, of copies, and in turn: the tokens are those of the plain model."""
    model = random_model("llama", vocab_size=256, max_position_embeddings=4096)
    samples = {
        name: TASKS[name].make(TOKENIZER, TEXTS["moby_dick"], 900, Random(0))
        for name in ("passkey", "needles-after", "recall")
    }
    expected = {name: plain(model, TASKS[name].asked, s) for name, s in samples.items()}
    configs = make_configs([task_runs.FULL], FullCache.of(model), 900, 600)
    with Contest(model, configs) as contest:
        for name, sample in samples.items():
            found = answer(contest, [task_runs.FULL.name], TASKS[name], sample, model.device)
            assert found[task_runs.FULL.name].tokens == expected[name]


def plain(model: PreTrainedModel, asked: Asked, sample: Sample) -> list[list[int]]:
    """Answers of the model with transformers' cache."""
    out, before = [], sample.document
    for turn in sample.turns:
        ids = torch.tensor([[*before, *turn.question]])
        more = len(turn.tokens) + MORE
        given = model.generate(ids, max_new_tokens=more, min_new_tokens=more, do_sample=False)
        out.append(given[0, ids.shape[1] :].tolist())
        if asked is Asked.in_turn:
            before = given[0].tolist()
    return out


def test_refusals() -> None:
    with pytest.raises(UnknownOptionError, match="unknown task 'niah'"):
        tiny(tasks=["niah"])
    with pytest.raises(UnknownOptionError, match="unknown method 'none'"):
        tiny(methods=["none"])
    with pytest.raises(EvaluationError, match="more than the 4096 positions"):
        tiny(tasks=["passkey"], contexts=[4090])
    with pytest.raises(EvaluationError, match="one prompt at least"):
        tiny(prompts=0)


def test_the_command_adds_to_its_file(tmp_path: Path) -> None:
    folder, path = save(tmp_path / "model"), tmp_path / "rows.jsonl"
    text = tmp_path / "moby.txt"
    text.write_text(TEXTS["moby_dick"])
    args = [
        "eval", "tasks", "--model", folder, "--task", "many-shot", "--context", "300", "--method",
        "full", "--prompts", "1", "--json", path, "--text", text, "--quick",
    ]  # fmt: skip
    for count in (1, 1):
        result = CliRunner().invoke(app, [str(a) for a in args])
        assert result.exit_code == 0, result.output
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == count
    assert rows[0]["text"].startswith("moby.txt#") and rows[0]["tokens"] == 300
    assert "agrees" in result.stdout
    text.write_text(TEXTS["moby_dick"][5000:])  # another text of that name
    CliRunner().invoke(app, [str(a) for a in args])
    assert len(path.read_text().splitlines()) == 2
