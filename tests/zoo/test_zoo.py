"""The rows of the zoo: as expected for some architectures here and for all of them when slow."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from arkv_fx.passes import classify

from arkv_fx.errors import CacheError, ModelNotFoundError
from arkv_fx.state.session import PlainLayer, Session
from arkv_fx.zoo import checks, expect
from arkv_fx.zoo.checks import examine
from arkv_fx.zoo.configs import architectures
from arkv_fx.zoo.outcome import COLUMNS, VISIBLE, blank, is_wrong
from arkv_fx.zoo.run import _Worker, run, summary

EXPECTED = Path(__file__).parent / "expected.json"
SAMPLE = (
    "bert", "bloom", "gemma2", "gpt_oss", "llama", "mamba", "t5:seq2seq",
)  # fmt: skip


def must_be_as_expected(row: dict[str, Any]) -> None:
    lines = expect.mismatches([row], expect.load(EXPECTED))
    assert not lines, "\n".join([*lines, row["error"]])


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_as_expected(name: str) -> None:
    must_be_as_expected(examine(name, quick=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures())
def test_every_architecture_is_as_expected(name: str) -> None:
    must_be_as_expected(examine(name))


def test_a_row_has_all_answers() -> None:
    row = examine("llama")
    assert tuple(row) == COLUMNS
    assert (row["status"], row["sites"], row["fused"], row["breaks"]) == ("fused", 2, 2, 0)
    assert all(row[c] <= 1e-5 for c in ("identity", "padded", "chunked", "own"))
    assert all(row[c] is True for c in ("generate", "finite", "bounded", "repeatable"))
    assert min(row["moved"], row["control"]) > 0.1
    assert row["graphs"] == 4


def test_a_fused_layer_that_loses_a_token_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Session.layer

    def forgets(self: Session, *args: Any) -> Any:
        state = layer(self, *args)
        state.view().ring.pos[:, :, 1] = -1
        return state

    monkeypatch.setattr(Session, "layer", forgets)
    row = examine("llama", quick=True)
    assert (row["status"], row["wrong"]) == ("wrong", "identity, padded, generate")
    assert row["fused"] == 2 and row["identity"] > VISIBLE


def test_an_unfused_layer_that_changes_a_value_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    append = PlainLayer.append

    def doubles(self: PlainLayer, k: torch.Tensor, v: torch.Tensor) -> Any:
        keys, values = append(self, k, v)
        return keys, values * 2

    monkeypatch.setattr(PlainLayer, "append", doubles)
    monkeypatch.setattr(classify, "_decide", lambda site, _: site.refuse("for this test"))
    row = examine("gpt2", quick=True)
    assert (row["status"], row["wrong"]) == ("wrong", "identity, padded, generate")
    assert (row["fused"], row["reasons"]) == (0, "2x for this test")


def test_reasons_do_not_hold_names_of_nodes() -> None:
    reason = (
        "also read by %out_1 : [num_users=1] = call_function[target=torch._C._nn.sdpa](args = "
        "(%q, %k), kwargs = {scale: 1.0}); s74 queries for 20 keys"
    )
    assert checks._stable(reason) == "also read by sdpa; n queries for 20 keys"


def test_nan_is_wrong() -> None:
    assert is_wrong("identity", float("nan"))
    assert not is_wrong("chunked", None)


def test_errors_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of ours is a refusal; any other is raised; neither hides the other checks."""

    def fails(error: Exception) -> Any:
        def check(subject: checks.Subject) -> dict[str, Any]:
            raise error

        return check

    for error, column in ((CacheError("no"), "refused"), (IndexError("no"), "raised")):
        monkeypatch.setitem(checks._ROOMY_QUICK, "identity", fails(error))
        row = examine("gpt2", quick=True)
        assert (row["status"], row[column]) == (column, "identity")
        assert row["error"] == f"identity: {type(error).__name__}: no"
        assert row["padded"] < 1e-5


def test_a_cache_that_does_not_matter_makes_a_blind_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "VISIBLE", 100.0)
    assert examine("gpt2", quick=True)["status"] == "blind"


def test_what_has_no_cache_says_why() -> None:
    row = examine("mamba")
    assert row["status"] == "no cache" and "recurrent" in row["reasons"]


def test_a_process_that_dies_or_hangs_is_a_row() -> None:
    def kill() -> None:
        assert worker.process is not None and worker.process.pid is not None
        os.kill(worker.process.pid, signal.SIGKILL)

    with _Worker(quick=True) as worker:
        late = worker.examine("llama", limit_s=0.1)
        assert (late["status"], late["error"]) == ("crashed", "more than 0.1 seconds")
        threading.Timer(1.0, kill).start()
        dead = worker.examine("llama", limit_s=60)
        assert (dead["status"], dead["error"]) == ("crashed", "the process ended with exit code -9")
        after = worker.examine("mamba", limit_s=60)
        assert after["status"] == "no cache"
    assert summary([late, dead, after]) == {
        "architectures": 3, "cacheable": 2, "fused": 0, "correct": 0,
    }  # fmt: skip


def test_a_kind_stands_for_its_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Worker, "examine", lambda self, name, limit_s: blank(name))
    rows = list(run(["seq2seq", "llama", "t5:seq2seq"]))
    assert [row["architecture"] for row in rows] == [*architectures("seq2seq"), "llama"]
    assert {row["kind"] for row in rows} == {"seq2seq", "causal"}
    assert {row["kind"] for row in run()} == {"causal"}


def test_unknown_names_are_refused_before_anything_runs() -> None:
    with pytest.raises(ModelNotFoundError, match="'llamma', 'gtp2'"):
        next(run(["llama", "llamma", "gtp2"]))
