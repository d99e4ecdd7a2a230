"""The order of the passes, what is noted of each, and what the log shows of them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from arkv_fx.passes import pipeline
from arkv_fx.passes.contract import Pass, in_order
from arkv_fx.passes.nodes import sizes_of
from pass_harness import apply, cached, capture, check_output, lift, tensors
from torch import Tensor
from torch.fx import Graph

from arkv_fx.errors import PassError

LOG = "arkv_fx.passes"
REWRITING = """
from pass_harness import cached, capture, lift, tensors
capture(cached(lift), *tensors(6))
"""


def nothing(*_: object) -> int:
    return 0


FINDS = Pass("finds", nothing, gives=("sites",))
FINDS_MORE = Pass("finds_more", nothing, gives=("sites",))
USES = Pass("uses", nothing, needs=("sites",))


def test_a_fact_must_be_given_before_it_is_needed() -> None:
    assert in_order(FINDS, FINDS_MORE, USES) == (FINDS, FINDS_MORE, USES)
    with pytest.raises(PassError, match="uses needs 'sites' and stands in front of finds_more"):
        in_order(FINDS, USES, FINDS_MORE)
    with pytest.raises(PassError, match="uses needs 'sites', which no pass gives"):
        in_order(USES)


def test_no_pass_may_change_places_with_one_that_it_needs() -> None:
    """Every pair of which one needs what the other gives, in the order that would be wrong."""
    passes = pipeline.PASSES
    assert in_order(*passes) == passes
    pairs = [(a, b) for a in passes for b in passes if set(a.gives) & set(b.needs)]
    assert len(pairs) > len(passes)
    for giver, user in pairs:
        others = [p for p in passes if p not in (giver, user)]
        with pytest.raises(PassError, match=user.name):
            in_order(user, giver, *others)


def test_a_pass_is_called_as_its_file() -> None:
    for step in pipeline.PASSES:
        assert sys.modules[f"arkv_fx.passes.{step.name}"].PASS is step


def test_what_each_pass_did_is_noted() -> None:
    out = capture(cached(lift), *tensors(6))
    assert [done.name for done in out.context.trace] == [step.name for step in pipeline.PASSES]
    matches = {done.name: done.matches for done in out.context.trace if done.matches}
    assert matches == {"find_sdpa": 1, "fuse_marker": 1, "classify": 1, "rewrite": 1, "verify": 1}
    assert all(done.seconds > 0 for done in out.context.trace)


def test_a_backend_keeps_what_was_noted_of_every_graph() -> None:
    backend = check_output(cached(lift))
    assert len(backend.traces) == len(backend.sites) > 1
    assert {len(trace) for trace in backend.traces} == {len(pipeline.PASSES)}


def test_a_graph_is_one_line_at_level_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOG)
    capture(cached(lift), *tensors(6))
    (line,) = [r.getMessage() for r in caplog.records if r.name == LOG]
    assert line.startswith("1 attention sites, 1 fused (find_sdpa 1, fuse_marker 1, classify 1, ")
    assert line.endswith(" ms")


def test_a_graph_that_no_pass_changes_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    def plain(x: Tensor) -> Tensor:
        return x * 2

    caplog.set_level(logging.DEBUG, logger=LOG)
    apply(plain, tensors(6)[0])
    assert [r.levelname for r in caplog.records if r.name == LOG] == ["INFO"]


def test_a_graph_is_not_written_out_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(pipeline, "_text", lambda graph: calls.append(graph) or "")
    monkeypatch.setattr(pipeline, "_line", lambda context: calls.append(context) or "")
    capture(cached(lift), *tensors(6))
    assert not calls
    logging.getLogger(LOG).setLevel(logging.DEBUG)
    try:
        capture(cached(lift), *tensors(6))
    finally:
        logging.getLogger(LOG).setLevel(logging.NOTSET)
    assert calls


@pytest.mark.parametrize("level", ["debug", ""])
def test_the_environment_turns_the_log_on(level: str) -> None:
    folders = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "ARKV_LOG": level, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REWRITING],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not done.stdout
    if not level:
        assert not done.stderr
        return
    before, after = done.stderr.split(f"{LOG}: the graph after rewrite:")
    before = before.split(f"{LOG}: the graph before rewrite:")[1]
    assert "scaled_dot_product_attention(" in before and "arkv.attend" not in before
    assert "arkv.attend" in after and "scaled_dot_product_attention(" not in after
    assert f"{LOG}: 1 attention sites, 1 fused" in after


def test_a_node_without_a_shape_is_named() -> None:
    node = Graph().placeholder("unknown")
    with pytest.raises(PassError, match=r"%unknown .* has no shape"):
        sizes_of(node)
