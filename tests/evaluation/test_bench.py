"""The benchmark: what it times and in which order, its rows and ratios, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from arkv_fx.cli import app
from arkv_fx.errors import ConfigError, UnknownOptionError
from arkv_fx.evaluation import bench as package
from arkv_fx.evaluation.bench import SECTIONS, Measurement, Options, bench, compilation, get_case
from arkv_fx.evaluation.bench import timing as timing_
from arkv_fx.evaluation.bench.compile_once import Order, generated, measure
from arkv_fx.evaluation.bench.contest import Entrant, compete
from arkv_fx.evaluation.bench.measurements import conditions, plot, tables, write
from arkv_fx.evaluation.bench.timing import Rotation, Timing, interleaved
from arkv_fx.kernels import usable
from arkv_fx.models import random_model

ROOT = Path(__file__).parents[2]
TINY = Options(
    cases=(get_case("2x4x16"),), slots=64, contexts=(80, 96), prompt=96, rounds=3, steps=3,
    lowerings=("eager",), backend="eager",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Options whose model has random weights."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    random_model("llama", num_hidden_layers=1).config.to_json_file(path)
    return replace(TINY, model=str(path))


@pytest.fixture(scope="module")
def found(tiny: Options) -> list[Measurement]:
    """Every section, once; what ``compile`` runs in processes runs in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "_run", lambda order, folder: measure(order))
        patch.setattr(compilation, "BASELINES", ("static-compiled",))
        patch.setattr(import_module("arkv_fx.evaluation.bench.dispatch"), "LAYERS", 2)
        layers = [name for name in SECTIONS if name != "model"]
        return bench(layers, tiny) + bench(["model"], replace(tiny, contexts=(96,)))


def of(rows: list[Measurement], section: str) -> dict[str, Measurement]:
    return {row.label: row for row in rows if row.section == section}


def test_every_section_gives_rows_with_one_result_or_a_reason(found: list[Measurement]) -> None:
    assert {row.section for row in found} == set(SECTIONS)
    for row in found:
        results = [row.median_us, row.cpu_s]
        assert sum(r is not None for r in results) == (
            0 if row.note and "not av" in row.note else 1
        )
        assert row.dtype == "float32" and row.method
        assert (row.tokens_per_s is not None) == (row.section == "model" and not row.note)
        assert set(row.ratio_to.values()) <= {r for r in row.ratio_to.values() if r >= 0}
    labels = [(row.section, row.case, row.label) for row in found]
    assert len(set(labels)) == len(labels)


def test_ratios_are_quotients_of_medians(found: list[Measurement]) -> None:
    checked = 0
    for row in found:
        others = of(found, row.section)
        for name, ratio in row.ratio_to.items():
            other = others.get(name)
            if other is None:
                assert name.startswith("fastest full cache@")
            elif row.median_us is not None and other.median_us is not None:
                assert ratio == other.median_us / row.median_us
                checked += 1
            else:
                assert row.cpu_s and other.cpu_s and ratio == other.cpu_s / row.cpu_s
    assert checked >= 10


def test_the_attention_is_compared_with_every_baseline_and_the_bound(
    found: list[Measurement],
) -> None:
    rows = of(found, "attention")
    full = [f"sdpa-{how}@{n}" for n in (80, 96, 64) for how in ("transformers", "packed")]
    kernels = usable(torch.device("cpu"))
    ours = [f"arkv-{kernel}" for kernel in kernels]
    if kernels[0] == "cpp":  # which has whole steps besides
        ours.insert(1, "arkv-cpp step")
    assert list(rows) == [*ours, "bound", *full]
    assert set(rows["arkv-reference"].ratio_to) == {"bound", *full}
    assert rows["sdpa-packed@96"].bytes == 96 * 2 * 2 * 16 * 4


def test_exported_graphs_hold_what_torch_holds(found: list[Measurement]) -> None:
    rows = of(found, "export")
    assert list(rows) == [
        "export to ONNX", "engine prefill SM89", "engine decode SM89", "onnxruntime", "arkv-eager",
    ]  # fmt: skip
    # Exported graphs number positions in four bytes, this model's cache in two.
    wider = 2 * 2 * 64
    # Beside the state torch holds a handle.
    assert 0 < (rows["arkv-eager"].bytes or 0) + wider - (rows["onnxruntime"].bytes or 0) <= 64
    assert set(rows["onnxruntime"].ratio_to) == {"arkv-eager"}


def test_bytes_are_the_plans(found: list[Measurement]) -> None:
    plan = TINY.plan(TINY.cases[0])
    assert plan.slots == 64
    for section in ("attention", "update", "prefill"):
        ours = [r for r in found if r.section == section and r.method.startswith("arkv")]
        assert ours and all(row.bytes == plan.nbytes() and row.slots == 64 for row in ours)


def test_tiers_are_those_asked_for() -> None:
    plans = [replace(TINY, tiers=tiers).plan(TINY.cases[0]) for tiers in (None, ("int8",))]
    assert [[tier.format for tier in plan.tiers] for plan in plans] == [["k8v4", "k4v3"], ["int8"]]


def test_the_update_is_the_difference_of_the_medians(found: list[Measurement]) -> None:
    rows = of(found, "update")
    alone, step, rest = (rows[f"arkv-reference {part}"] for part in ("attention", "step", "update"))
    assert rest.median_us == step.median_us - alone.median_us  # type: ignore[operator]
    assert step.ratio_to == {"arkv-reference attention": alone.median_us / step.median_us}  # type: ignore[operator]
    assert rest.note and rest.note.endswith("of the step")


def test_whole_models_name_what_cannot_run(found: list[Measurement]) -> None:
    rows = of(found, "model")
    for backend in ("quanto", "hqq", "fp8"):
        row = rows[f"quantized-{backend}@96"]
        assert row.median_us or (row.note and row.note.startswith("not available: "))
    # 3 steps and 3 before them; static caches count their tokens in a tensor besides.
    assert rows["static-compiled@96"].bytes == (96 + 6) * 2 * 2 * 16 * 4 + 8
    assert rows["dynamic-eager@96"].bytes == 96 * 2 * 2 * 16 * 4
    ours = rows["arkv-eager@96"]
    assert ours.slots == 64
    assert ours.bytes == TINY.plan(TINY.cases[0]).nbytes() + 8  # and the handle
    full = [rows[f"{name}@96"] for name in ("dynamic-eager", "dynamic-compiled", "static-compiled")]
    fastest = min(row.median_us for row in full if row.median_us)
    assert ours.ratio_to["fastest full cache@96"] == fastest / ours.median_us  # type: ignore[operator]


def test_compile_counts_what_recalibrating_generates(found: list[Measurement]) -> None:
    rows = of(found, "compile")
    for start in ("cold", "warm"):
        assert rows[f"arkv-eager {start} decode"].cpu_s is not None
        assert rows[f"static-compiled {start} decode"].cpu_s is not None
    assert rows["arkv-eager recalibrated decode"].note == "0 graphs were generated anew"


def test_compile_runs_in_a_process_with_a_cache_of_its_own(tiny: Options, tmp_path: Path) -> None:
    order = Order("static-compiled", tiny.model, "float32", "cpu", 64, 1, "eager")
    assert compilation._run(order, str(tmp_path))["decode"] > 0


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho first >&2; echo 'no such model' >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    order = Order("static-compiled", "none", "float32", "cpu", 64, 1, "eager")
    assert compilation._run(order, str(tmp_path)) == {"error": "not available: no such model"}


def test_generated_graphs_are_counted() -> None:
    before = generated()
    number = time.time()  # a constant that no cache knows
    step = torch.compile(lambda x: x * number)
    step(torch.ones(2))
    assert generated() == before + 1
    step(torch.ones(2))
    assert generated() == before + 1


def recorder(log: list[str], name: str, span: float, clock: list[float]) -> Callable[[], str]:
    def call() -> str:
        log.append(name)
        clock[0] += span
        return name

    return call


def test_methods_take_turns_and_a_fake_clock_gives_their_medians() -> None:
    log: list[str] = []
    clock = [0.0]
    seen: list[dict[str, Any]] = []

    def watch(call: Callable[[], Any]) -> tuple[float, Any]:
        before = clock[0]
        result = call()
        return clock[0] - before, result

    methods = {n: recorder(log, n, s, clock) for n, s in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    times = interleaved(
        methods, rounds=8, warmup=2, watch=watch, after=lambda r: seen.append(dict(r))
    )
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 10 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 2  # not always in one another's wake
    assert {n: t.median for n, t in times.items()} == {"a": 1.0, "b": 2.0, "c": 4.0}
    assert seen == [{"a": "a", "b": "b", "c": "c"}] * 10


def test_timing_is_median_and_quartiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, 2.0, 4.0)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0)


def test_a_slower_method_shows_up_as_slower() -> None:
    x = torch.randn(8, 8)

    def slow() -> torch.Tensor:
        time.sleep(0.005)
        return x @ x

    rows = compete(
        [Entrant(Measurement("s", "c", "fast"), lambda: x @ x),
         Entrant(Measurement("s", "c", "slow"), slow)],
        TINY, lambda message: None,
    )  # fmt: skip
    fast, late = rows
    assert late.median_us and late.median_us >= 5000
    assert late.against([fast]).ratio_to["fast"] < 0.5
    assert fast.against([late]).ratio_to["slow"] > 2


def test_a_method_that_cannot_run_is_a_row_with_the_reason() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel. Long story")

    row, other = compete(
        [Entrant(Measurement("s", "c", "broken"), broken),
         Entrant(Measurement("s", "c", "works"), lambda: None)],
        TINY, lambda message: None,
    )  # fmt: skip
    assert row.note == "not available: no such kernel" and row.median_us is None
    assert other.median_us is not None and other.against([row]).ratio_to == {}


def test_data_is_cold() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    rotation = Rotation(make, nbytes=10, cold=45)
    assert len(made) == 5
    uses = [rotation() for _ in range(10)]
    assert len(set(uses[:5])) == 5 and uses[:5] == uses[5:]
    assert len(Rotation(make, nbytes=1000, cold=45).copies) == 2
    assert timing_.cold_bytes(torch.device("cpu")) >= 2**20


def test_threads_are_pinned_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def section(options: Options, progress: Callable[[str], None]) -> list[Measurement]:
        seen.append(torch.get_num_threads())
        assert not torch.is_grad_enabled()
        return []

    monkeypatch.setitem(package.SECTIONS, "threads", section)
    before = torch.get_num_threads()
    bench(["threads"], replace(TINY, threads=2))
    assert seen == [2] and torch.get_num_threads() == before


def test_json_plot_and_tables(found: list[Measurement], tmp_path: Path) -> None:
    write(tmp_path / "b.json", conditions(TINY), found)
    data = json.loads((tmp_path / "b.json").read_text())
    assert {"threads", "torch", "cpu", "rounds", "dtype"} <= set(data["conditions"])
    assert all(set(row) == {f.name for f in fields(Measurement)} for row in data["rows"])
    assert len(data["rows"]) == len(found)
    assert all(tables(found))
    pytest.importorskip("matplotlib")
    plot(found, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownOptionError, match=r"unknown section 'speed'; known: attention"):
        bench(["attention", "speed"], TINY)
    for name in ("llama-9", "3x4x16", "0x4x16", "2x4"):
        with pytest.raises(UnknownOptionError, match=f"unknown case '{name}'; known: llama-3-8b"):
            get_case(name)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["speed"], "unknown section 'speed'"),
        (["--case", "llama-9"], "unknown case 'llama-9'"),
        (["--contexts", "4k"], "give token counts by commas"),
        (["attention", "--case", "2x4x16", "--slots", "8"], "at least window + sinks"),
        (["model", "--model", "none.json"], "cannot make a model"),
        (["attention", "--tier", "int9"], "int9"),
        (["--device", "nowhere"], "device 'nowhere'"),
    ],
)
def test_the_command_refuses_in_one_line(args: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert says in result.stderr.replace("\n", " ")
    assert issubclass(UnknownOptionError, ConfigError)


def documented() -> list[str]:
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/benchmarks.md")]
    return [line for text in texts for line in re.findall(r"^arkv bench.*$", text, re.MULTILINE)]


def test_there_are_documented_commands() -> None:
    assert len(documented()) >= 2


@pytest.mark.parametrize("line", documented())
def test_documented_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Options]] = []

    def fake(sections: Any, options: Options, progress: Any) -> list[Measurement]:
        assert all(name in SECTIONS for name in sections)
        asked.append((sections, options))
        return []

    command = "arkv_fx.commands.time_methods"
    monkeypatch.setattr(f"{command}.bench_", fake)
    monkeypatch.setattr(f"{command}.device_of", torch.device)  # there may be no GPU
    monkeypatch.setattr(f"{command}.measurements_.write", lambda *args: None)
    monkeypatch.setattr(f"{command}.measurements_.plot", lambda *args: None)
    result = CliRunner().invoke(app, shlex.split(line.partition("#")[0])[1:])
    assert result.exit_code == 0, result.output
    assert len(asked) == 1
