"""lm-eval's model ``arkv``: local tasks, scored through the cache."""

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import save, tokenizer
from transformers import PreTrainedModel

import arkv_fx
from arkv_fx import texts
from arkv_fx.errors import ConfigError, EvaluationError, UnknownOptionError
from arkv_fx.models import random_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict

from arkv_fx.evaluation.lm_eval_model import ArkvLM

TEXT = texts.read("moby_dick")
ALL = {"budget": 900, "tiers": "native", "window": 8}
SMALL = {"budget": 40, "tiers": "native", "window": 8}
ASKS = [
    (TEXT[a : a + length], TEXT[a + length : a + length + more])
    for a, length, more in ((0, 300, 3), (50, 200, 1), (90, 310, 3), (400, 1, 5), (6, 250, 12))
]
"""Contexts and continuations: a token a byte. lm-eval moves spaces that end a context."""
assert not any(context.endswith((" ", "\n")) for context, _ in ASKS)


def model() -> PreTrainedModel:
    return random_model("llama", vocab_size=256, max_position_embeddings=1024)


def ours(batch_size: int = 1, **options: Any) -> ArkvLM:
    return ArkvLM(model(), tokenizer=padded(), batch_size=batch_size, calibration="none", **options)


def theirs(network: PreTrainedModel | None = None) -> HFLM:
    return HFLM(pretrained=network or model(), tokenizer=padded(), batch_size=1)


def padded() -> Any:
    tok = tokenizer()
    tok.pad_token = tok.eos_token = tok.decode([0])
    return tok


def scores(lm: Any, asks: list[tuple[str, str]] = ASKS) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, ask, i) for i, ask in enumerate(asks)]
    return list(lm.loglikelihood(requests, disable_tqdm=True))


def assert_close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4)
    assert [x for _, x in found] == [x for _, x in expected]


@pytest.mark.parametrize("batch_size, chunk", [(1, 0), (1, 1), (3, 32), (4, 2)])
def test_slots_for_everything_score_as_the_full_cache(batch_size: int, chunk: int) -> None:
    assert_close(scores(ours(batch_size, chunk=chunk, **ALL)), scores(theirs()))


def step_by_step(network: PreTrainedModel, context: str, continuation: str) -> float:
    """The log-probability of a continuation, each token of it predicted by an ArkvCache."""
    tok, cache, total = padded(), arkv_fx.ArkvCache(network), 0.0
    ids = tok(context).input_ids
    if len(ids) > 1:
        network(torch.tensor([ids[:-1]]), past_key_values=cache)
    last = ids[-1]
    for token in tok(continuation).input_ids:
        logits = network(torch.tensor([[last]]), past_key_values=cache).logits
        total += float(logits[0, -1].log_softmax(-1)[token])
        last = token
    return total


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_small_budget_scores_as_step_by_step(batch_size: int) -> None:
    lm = ours(batch_size, chunk=1, **SMALL)
    found = [x for x, _ in scores(lm)]
    assert found == pytest.approx([step_by_step(lm.model, *ask) for ask in ASKS], abs=1e-4)
    full = [x for x, _ in scores(theirs())]
    long = [i for i, (context, _) in enumerate(ASKS) if len(context) > 1]
    assert all(abs(found[i] - full[i]) > 1e-2 for i in long)


def test_one_chunk_reads_what_the_prompt_left() -> None:
    """A short continuation displaces nothing that a token of it would miss; a long one does."""
    short = [(TEXT[:300], TEXT[300:302])]
    assert_close(scores(ours(chunk=0, **SMALL), short), scores(ours(chunk=2, **SMALL), short))
    long = [(TEXT[:300], TEXT[300:380])]
    whole, steps = (scores(ours(chunk=n, **SMALL), long)[0][0] for n in (0, 1))
    assert abs(whole - steps) > 1e-2


def test_rolling_windows() -> None:
    """Two and a half windows of the model's positions."""
    request = [Instance("loglikelihood_rolling", {}, (TEXT[:700],), 0)]
    short = {"max_length": 280}

    def rolled(lm: Any) -> float:
        return float(lm.loglikelihood_rolling(request, disable_tqdm=True)[0])

    full = HFLM(pretrained=model(), tokenizer=padded(), batch_size=1, **short)
    assert rolled(ours(2, **ALL, **short)) == pytest.approx(rolled(full), abs=1e-2)
    assert abs(rolled(ours(2, **SMALL, **short)) - rolled(full)) > 1


@pytest.fixture
def local_tasks(tmp_path: Path) -> Iterator[Path]:
    """A multiple choice and a generation, each a yaml beside its data."""
    rows = [
        {"text": TEXT[i * 300 : i * 300 + 280], "choices": ["one", "the", "whale"], "label": i % 3}
        for i in range(4)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
    (tmp_path / "choice.yaml").write_text(
        head + "task: local_choice\noutput_type: multiple_choice\n"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
    )
    (tmp_path / "words.yaml").write_text(
        head + "task: local_words\noutput_type: generate_until\ndoc_to_target: label\n"
        "generation_kwargs: {until: ['~~~'], max_gen_toks: 12}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    yield tmp_path


def evaluated(lm: Any, folder: Path) -> list[Any]:
    """What a model answered to the local tasks."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = get_task_dict(["local_choice", "local_words"], manager)
    found = evaluate(lm, tasks, bootstrap_iters=0)
    return [sample["resps"] for samples in found["samples"].values() for sample in samples]


def flat(answers: list[Any]) -> tuple[list[float], list[str]]:
    """Log-likelihoods and texts of ``evaluated``."""
    out: tuple[list[float], list[str]] = ([], [])
    stack = copy.deepcopy(answers)
    while stack:
        one = stack.pop(0)
        if isinstance(one, list):
            stack[:0] = one
        elif isinstance(one, tuple):
            out[0].append(float(one[0]))
        else:
            out[1].append(one)
    return out


def test_local_tasks_of_both_kinds(local_tasks: Path) -> None:
    full = flat(evaluated(theirs(), local_tasks))
    same = flat(evaluated(ours(2, **ALL), local_tasks))
    small = flat(evaluated(ours(2, **SMALL), local_tasks))
    assert len(full[0]) == 12 and len(full[1]) == 4
    assert same[0] == pytest.approx(full[0], abs=1e-4) and same[1] == full[1]
    assert small[0] != pytest.approx(full[0], abs=1e-2) and small[1] != full[1]


def test_the_command(local_tasks: Path) -> None:
    """lm-eval's own command, in a process that only our module was named to."""
    folder = save(local_tasks / "model")
    padded().save_pretrained(folder)
    out = local_tasks / "out"
    command = [
        sys.executable, "-P", "-m", "arkv_fx.evaluation.lm_eval_model", "run", "--model", "arkv",
        "--model_args", f"pretrained={folder},budget=40,window=8,tiers=native,dtype=float32",
        "--tasks", "local_choice", "--include_path", str(local_tasks), "--device", "cpu",
        "--batch_size", "2", "--output_path", str(out),
    ]  # fmt: skip
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=local_tasks,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "local_choice" in run.stdout
    (written,) = out.rglob("results_*.json")
    assert "acc,none" in json.loads(written.read_text())["results"]["local_choice"]


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"compresion": 4}, UnknownOptionError, "compresion are unknown"),
        ({"compression": 4, "budget": 9}, ConfigError, "give one of compression, budget"),
        ({"preset": "none"}, UnknownOptionError, "none"),
        ({"chunk": -1}, EvaluationError, "chunk=-1"),
        ({"batch_size": "auto"}, EvaluationError, "give a number"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ArkvLM(model(), tokenizer=padded(), **options)


def test_their_model_over_ours_is_warned_of_once() -> None:
    network = arkv_fx.transform(
        model(), arkv_fx.ArkvConfig(budget=40, window=8, tiers=("native",)), False, compile="eager"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        found = scores(theirs(network))
    told = [w for w in caught if "lm_eval_model.ArkvLM" in str(w.message)]
    assert len(told) == 1
    assert_close(found, scores(theirs()))  # which is what it tells
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lm_eval_model.ArkvLM")
        scores(ours(2, **SMALL))
        network(torch.zeros(1, 8, dtype=torch.long))  # as many as the window holds
