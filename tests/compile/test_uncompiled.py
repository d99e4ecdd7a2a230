"""Graphs run as they are: which kernel their attention gets, and that it changes no answer."""

from __future__ import annotations

import pytest
import torch

import arkv_fx
from arkv_fx.compile import backend
from arkv_fx.compile.uncompiled import ATTENTIONS, run_as_it_is
from arkv_fx.kernels import KERNELS, usable
from arkv_fx.models import random_model
from arkv_fx.ops.signatures import AttendArguments

CONFIG = arkv_fx.ArkvConfig(budget=40, window=4, sinks=2)
IDS = torch.arange(1, 91)[None] % 120


def answers(lowering: str, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, set[str]]:
    """Logits of a prompt and of twelve tokens, and the kernels that their graphs name."""
    kernels = set()

    def noted(graph: torch.fx.GraphModule, name: str) -> object:
        run = run_as_it_is(graph, name)
        attentions = [n for n in graph.graph.nodes if n.target in ATTENTIONS]
        kernels.update(AttendArguments.of(n).kernel for n in attentions)
        return run

    monkeypatch.setattr(backend, "run_as_it_is", noted)
    model = arkv_fx.transform(random_model("llama"), CONFIG, False, compile=lowering)
    cache = arkv_fx.ArkvCache(model)
    calls = [IDS, *IDS[:, :12].split(1, 1)]
    with torch.no_grad():
        found = [model(ids, past_key_values=cache, logits_to_keep=1).logits for ids in calls]
    return torch.cat(found, 1), kernels


def test_eager_graphs_have_the_fastest_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, named = answers("reference", monkeypatch)
    assert named == {"reference"}
    found, named = answers("eager", monkeypatch)
    able = [n for n in usable(torch.device("cpu")) if not KERNELS.find(n).for_inductor]
    assert named == {able[0]}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    full = random_model("llama")(torch.cat([IDS, IDS[:, :12]], 1), logits_to_keep=13).logits
    assert (found[:, 1:] - full[:, 1:]).abs().max() > 1e-2  # so something was evicted


def test_code_for_inductor_is_not_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler: the kernel for Inductor comes first there."""
    without = [KERNELS.find(name) for name in ("inductor", "reference")]
    monkeypatch.setattr("arkv_fx.kernels._by_priority", lambda device: without)
    assert usable(torch.device("cpu"))[0] == "inductor"
    assert answers("eager", monkeypatch)[1] == {"reference"}
