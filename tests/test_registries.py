"""One thing more of each kind, written here alone: score, preset, kernel, export target."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arkv_fx
from arkv_fx.compile import pieces
from arkv_fx.config import PRESETS, ArkvConfig, Preset
from arkv_fx.errors import ExportError, UnknownOptionError
from arkv_fx.exporting import TARGETS, Target
from arkv_fx.exporting.programs import Programs
from arkv_fx.kernels import KERNELS, Kernel, usable
from arkv_fx.kernels.cpp import make_step
from arkv_fx.models import random_model
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.scores import SCORES, CppRank, Observation, Score, StatField, Stats
from arkv_fx.scores.mass import MassScore

CONFIG = ArkvConfig(budget=40, window=8, sinks=2, tiers=("int8",))


class Oldest(Score):
    """The oldest tokens are kept, whatever anyone looks at."""

    name = "oldest"

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        return stats

    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        return age


class Backwards(MassScore):
    """Ranks the other way round than what the C++ step knows of its parent."""

    name = "backwards"

    def precision(self, stats: Stats, age: Tensor, valid: Tensor) -> Tensor:
        return -super().precision(stats, age, valid)


def plan(score: str) -> LayerPlan:
    return LayerPlan(2, 16, 16, torch.float32, 4, 1, 0, (Tier("int8", 8),), score)


def tokens(config: ArkvConfig, compile: str = "eager") -> tuple[list[int], Any]:
    model = random_model("llama")
    arkv_fx.transform(model, config, compile=compile)
    ids = torch.randint(1, 128, (1, 70), generator=torch.Generator().manual_seed(0))
    out = model.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    return out.sequences[0, 70:].tolist(), out.past_key_values


def test_a_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    SCORES.add(Oldest)
    try:
        found, cache = tokens(CONFIG.replace(score="oldest"))
        tier = slice(10, 40)
        assert cache.tensors()["0.pos"][0, 0, tier].sort().values.tolist() == [*range(2, 32)]
        assert tokens(CONFIG.replace(score="oldest"), "inductor")[0] == found
        assert make_step(plan("oldest")) is None
        folder = arkv_fx.export(
            random_model("llama"), None, tmp_path / "out", config=CONFIG.replace(score="oldest")
        )
        assert json.loads((folder / "arkv.json").read_text())["config"]["score"] == "oldest"
        monkeypatch.setattr(Oldest, "unexportable", "asks the stars")
        with pytest.raises(ExportError, match="score 'oldest' asks the stars"):
            arkv_fx.export(
                random_model("llama"), None, tmp_path / "b", config=CONFIG.replace(score="oldest")
            )
    finally:
        del SCORES["oldest"]


def test_a_score_does_not_inherit_what_the_cpp_step_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "backwards", Backwards)
    assert MassScore().cpp() is not None and Backwards().cpp() is None
    assert make_step(plan("backwards")) is None


class Extra(MassScore):
    """Keeps one statistic more than the C++ step walks through, and says that it knows it."""

    name = "extra"

    def __init__(self) -> None:
        super().__init__()
        self.slot_fields = (*self.slot_fields, StatField("more", torch.float32))

    def cpp(self) -> CppRank:
        return CppRank(self.decay, self.use_age)


def test_a_score_with_other_tensors_is_none_of_the_cpp_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SCORES, "extra", Extra)
    assert make_step(plan("extra")) is None
    assert all(make_step(plan(name)) for name in ("mass", "novelty", "combined"))


def test_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        PRESETS,
        "tiny",
        Preset("tiny", lambda **options: ArkvConfig.make({"budget": 99, **options})),
    )
    assert arkv_fx.preset("tiny").budget == 99
    assert arkv_fx.preset("tiny", window=4).window == 4
    assert ArkvConfig.make({"preset": "tiny", "sinks": 1}).budget == 99
    with pytest.raises(UnknownOptionError, match="unknown option wind"):
        arkv_fx.preset("tiny", wind=4)


def test_a_kernel_is_taken_by_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def attend(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(args[0].shape)
        return KERNELS["reference"].attend(*args)

    cpu = torch.device("cpu")
    mine = Kernel("mine", attend, priority=99, lacks=lambda plan: [] if plan.k_dim == 16 else ["?"])
    monkeypatch.setitem(KERNELS, "mine", mine)
    assert usable(cpu)[0] == "mine" == usable(cpu, plan("mass"))[0]
    assert usable(cpu, replace(plan("mass"), k_dim=32))[0] != "mine"
    monkeypatch.setitem(KERNELS, "mine", replace(mine, obstacle=lambda device: "not today"))
    assert "mine" not in usable(cpu)
    monkeypatch.setitem(KERNELS, "mine", replace(mine, priority=None))
    assert "mine" not in usable(cpu)
    monkeypatch.setitem(KERNELS, "mine", mine)
    with torch._inductor.config.patch(force_disable_caches=True):
        assert tokens(CONFIG, "inductor")[0] == tokens(CONFIG)[0]
    assert calls


def test_a_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write(
        folder: Path, programs: Programs, description: dict[str, Any], progress: Any, note: str = ""
    ) -> None:
        names = [graph.name for graph in programs.graphs]
        (folder / "graphs.txt").write_text(f"{note}: {' '.join(names)}")

    monkeypatch.setitem(TARGETS, "names", Target("names", write, ("note",)))
    model = random_model("llama", num_hidden_layers=1)
    folder = arkv_fx.export(model, None, tmp_path / "a", "names", config=CONFIG, note="hello")
    assert (folder / "graphs.txt").read_text() == "hello: prefill decode"
    assert json.loads((folder / "arkv.json").read_text())["target"] == "names"
    with pytest.raises(UnknownOptionError, match="target 'names' has no option colour"):
        arkv_fx.export(model, None, tmp_path / "b", "names", config=CONFIG, colour=1)


def test_compiled_code_of_others_is_not_taken_for_that_of_an_older_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.py"
    tags = []
    for number in (1, 1, 2):
        path.write_text(f"def attend(*args): return {number}")
        spec = spec_from_file_location("theirs", path)
        assert spec and spec.loader
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "theirs", module)
        monkeypatch.setitem(KERNELS, "theirs", Kernel("theirs", module.attend))
        tags.append(pieces._strangers())
    assert tags[0] == tags[1] != tags[2]
    scope: dict[str, Any] = {"__name__": "nowhere"}
    exec("def attend(*args): return 1", scope)
    monkeypatch.setitem(KERNELS, "theirs", Kernel("theirs", scope["attend"]))
    assert pieces._strangers() != pieces._strangers()
