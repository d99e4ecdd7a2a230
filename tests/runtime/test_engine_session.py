"""EngineSession up to the driver's own work: ONNX Runtime computes over the buffers it is given."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_cases as cases
import numpy as np
import pytest

from arkv_fx.errors import EngineError
from arkv_fx.runtime import EngineSession, OnnxSession, cuda_device, sign
from arkv_fx.runtime.digests import said_of
from arkv_fx.runtime.engine_state import EngineState

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("cuda.bindings.runtime")
from driver_recorder import Driver

IDS, MASK = (x.numpy() for x in cases.prompt())
STEP = "cudaGraphLaunch"
Make = Callable[..., tuple[EngineSession, Driver]]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def arch(request: pytest.FixtureRequest) -> str:
    """Layers in one stack, and float8 tensors that engines take layer by layer."""
    return str(request.param)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Opens a session on a recorder."""

    def opened(folder: Path, *, driver: Driver | None = None, **options: Any) -> Any:
        driver = driver or Driver(folder)
        monkeypatch.setattr(cuda_device, "import_module", driver.packages.__getitem__)
        return EngineSession(folder, **options), driver

    return opened


@pytest.fixture(scope="module")
def wanted(arch: str) -> OnnxSession:
    return OnnxSession(cases.engines(arch), threads=1)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_tokens_are_those_of_onnx_runtime(
    arch: str, wanted: OnnxSession, make: Make, cuda_graph: bool
) -> None:
    session, driver = make(cases.engines(arch), cuda_graph=cuda_graph)
    want = wanted.generate(IDS, 24, mask=MASK)
    assert len(np.unique(want)) > 8
    assert session.generate(IDS, 24, mask=MASK).tolist() == want.tolist()
    assert session.nbytes == wanted.nbytes
    # 23 steps: one of each direction is plain, the others replay the graph of their direction.
    assert driver.calls[STEP] == (21 if cuda_graph else 0)
    assert driver.calls["cudaGraphInstantiate"] == (2 if cuda_graph else 0)
    sampled = {"temperature": 1.5, "top_k": 20, "seed": 3}
    for session_ in (wanted, session):
        stream = session_.stream(IDS, 6, mask=MASK, **sampled)
        tokens = np.stack(list(stream), 1).tolist()
        assert tokens == wanted.generate(IDS, 6, mask=MASK, **sampled).tolist()
    stop = [int(want[0, 3])]
    ended = session.generate(IDS, 9, mask=MASK, stop=stop)
    assert ended.tolist() == wanted.generate(IDS, 9, mask=MASK, stop=stop).tolist()


def test_a_wrong_swap_is_seen(arch: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state goes by address alone: who reads the set of before repeats that step's past."""
    session, _ = make(cases.engines(arch))
    want = session.generate(IDS, 24, mask=MASK).tolist()
    monkeypatch.setattr(EngineState, "swap", lambda self: None)
    other, _ = make(cases.engines(arch))
    assert other.generate(IDS, 24, mask=MASK).tolist() != want


@pytest.mark.parametrize("length", [1, 3, 5, 12])
def test_short_prompts(arch: str, wanted: OnnxSession, make: Make, length: int) -> None:
    session, _ = make(cases.engines(arch))
    ids, mask = IDS[:, -length:], np.ones_like(IDS[:, -length:])
    mask[1, : length // 2] = 0
    assert length >= session.least or session.least == 5
    assert np.abs(session.prefill(ids, mask) - wanted.prefill(ids, mask)).max() < 1e-5
    for name, x in wanted.state().items():
        assert (session.state()[name] == x).all(), name


def test_long_prompts_are_refused_with_what_to_do(arch: str, make: Make) -> None:
    session, _ = make(cases.engines(arch))
    fitting = np.resize(IDS, (2, cases.LONGEST))
    session.prefill(fitting)
    with pytest.raises(EngineError, match=r"65 tokens: the engine takes 64 at most.*--longest 65"):
        session.prefill(np.resize(IDS, (2, cases.LONGEST + 1)))


def test_states_go_from_either_to_either(arch: str, wanted: OnnxSession, make: Make) -> None:
    session, _ = make(cases.engines(arch))
    fresh = wanted.generate(IDS, 20, mask=MASK)
    for first, then in ((session, wanted), (wanted, session), (session, session)):
        first.prefill(IDS, MASK)
        for token in fresh[:, :9].T:
            first.step(token)
        saved = first.state()
        first.reset()
        then.set_state(saved, MASK.sum(1) + 9)
        assert all((x == saved[name]).all() for name, x in then.state().items())
        rest = [then.step(token).argmax(-1) for token in fresh[:, 9:19].T]
        assert np.stack(rest, 1).tolist() == fresh[:, 10:].tolist()


def test_reset_forgets(arch: str, make: Make) -> None:
    session, _ = make(cases.engines(arch))
    empty = {t.input: np.full(t.shape, t.fill, t.dtype) for t in session.sidecar.tensors}
    for _ in range(2):  # in either set of buffers
        session.prefill(IDS, MASK)
        assert any((x != empty[name]).any() for name, x in session.state().items())
        session.reset()
        assert all((x == empty[name]).all() for name, x in session.state().items())


def test_keys_that_are_not_numbers_are_reported(arch: str, make: Make) -> None:
    session, _ = make(cases.engines(arch))
    session.prefill(IDS, MASK)
    state = session.state()
    ring = state["past_key_values.0.value"].copy()
    ring[0] = np.nan
    session.set_state({**state, "past_key_values.0.value": ring}, MASK.sum(1))
    with pytest.raises(EngineError, match="NaN"):
        session.step(IDS[:, 0])
    session.set_state(state, MASK.sum(1))
    session.step(IDS[:, 0])


def test_threads_wait_for_each_other(make: Make) -> None:
    session, _ = make(cases.engines("llama"))
    prompts = [np.roll(IDS, shift, 1) for shift in range(4)]
    want = [session.generate(ids, 8).tolist() for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = [f.tolist() for f in pool.map(lambda ids: session.generate(ids, 8), prompts * 2)]
    assert found == want * 2
    stream = session.stream(IDS, 4)
    next(stream)
    session.step(IDS[:, 0])
    with pytest.raises(EngineError, match="another call went on"):
        next(stream)


def test_steps_allocate_nothing_and_memory_is_given_back(arch: str, make: Make) -> None:
    session, driver = make(cases.engines(arch))
    session.generate(IDS, 4, mask=MASK)
    before = dict(driver.calls)
    held = sum(x.nbytes for x in driver.memory.values())
    assert 2 * session.nbytes < held < 2 * session.nbytes + 20_000
    session.generate(IDS, 9, mask=MASK)
    new = {name: n - before.get(name, 0) for name, n in driver.calls.items()}
    assert new["cudaMalloc"] == 0 and "cudaFree" not in new
    # Into the GPU go the inputs of a prompt and eight steps, and what is neither 0 nor -1 in an
    # empty state; out of it go logits and flags: of a stack of layers, or of each layer.
    stacks = [name for name in engine(driver.content)["inputs"] if name.endswith(".bad")]
    assert sum(t.fill == 1 for t in session.sidecar.tensors) == 1
    assert new["cudaMemcpyAsync"] == 3 + 8 * 2 + 9 * (1 + len(stacks)) + len(stacks)
    assert driver.loaded == 2
    del session
    gc.collect()
    assert not driver.memory and driver.loaded == 0
    assert driver.calls["cudaStreamDestroy"] == 1
    assert driver.calls["cudaGraphExecDestroy"] == driver.calls["cudaGraphInstantiate"] == 2


def test_a_runtime_that_takes_no_graphs_is_told_of(
    wanted: OnnxSession, arch: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(cases.engines(arch), takes_graphs=False)
    session, _ = make(cases.engines(arch), driver=driver)
    with caplog.at_level(logging.INFO, "arkv_fx.runtime"):
        found = session.generate(IDS, 12, mask=MASK)
    assert found.tolist() == wanted.generate(IDS, 12, mask=MASK).tolist()
    said = [r.getMessage() for r in caplog.records if r.name == "arkv_fx.runtime"]
    assert len(said) == 1 and "one by one" in said[0] and "cannot be captured" in said[0]
    assert driver.calls[STEP] == 0


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(cases.engines("llama"), tmp_path / "e"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "arkv.json").read_text())
    change(content)
    (folder / "arkv.json").write_text(json.dumps(content))


def refuses(make: Make, folder: Path, says: str, **driver: Any) -> Driver:
    recorder = Driver(cases.engines("llama"))
    for name, value in driver.items():
        setattr(recorder, name, value)
    with pytest.raises(EngineError, match=says):
        make(folder, driver=recorder)
    gc.collect()
    assert not recorder.memory
    return recorder


def test_engines_need_no_graphs_beside_them(copied: Path, make: Make) -> None:
    for path in (*copied.glob("*.onnx"), copied / "weights.data"):
        path.unlink()
    session, _ = make(copied, driver=Driver(cases.engines("llama")))
    assert session.generate(IDS, 2).shape == (2, 2)


def test_a_gpu_for_which_there_is_nothing(copied: Path, make: Make) -> None:
    says = "engines of both graphs for SM89, and this GPU is SM120: .*--capability SM120"
    assert refuses(make, copied, says, major=12, minor=0).calls["cudaStreamCreate"] == 0
    refuses(make, copied, "SM90, for which TensorRT for RTX builds no engines", major=9, minor=0)
    edit(copied, lambda c: c.pop("engines"))
    refuses(make, copied, "engines of both graphs for no GPU, and this GPU is SM89")


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_files_that_are_not_of_this_export(copied: Path, make: Make, graph: str) -> None:
    path = copied / f"{graph}.SM89.engine"
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)
    refuses(make, copied, f"{path.name}: not the engine that was exported")
    path.write_bytes(held[:-1])
    refuses(make, copied, f"{path.name}: not the engine that was exported")
    path.unlink()
    refuses(make, copied, f"{path.name}: the engine is missing")


def engine(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["engines"][1]
    assert found["graph"] == "decode"
    return found


POS = "past_key_values.0.pos"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: engine(c).update(file="../x.engine"), "leads out of the folder"),
        (lambda c: c["files"].pop("decode.SM89.engine"), "older arkv_fx's: KeyError"),
        (lambda c: engine(c).pop("shapes"), "older arkv_fx's: KeyError 'shapes'"),
        (lambda c: engine(c)["shapes"].update({POS: ["x"]}), "damaged.*pos"),
        (lambda c: engine(c)["inputs"].update({POS: "int3"}), "damaged.*pos"),
        (lambda c: engine(c)["shapes"].update({POS: [1, 2]}), f"does not fit .* in {POS}"),
        (lambda c: engine(c)["inputs"].update({POS: "float32"}), f"does not fit .* in {POS}"),
        (lambda c: engine(c)["state"].update({POS: [POS, 1]}), f"does not fit .* in {POS}"),
        (lambda c: engine(c)["state"].pop(POS), f"does not fit .* in {POS}"),
        (lambda c: engine(c)["inputs"].pop("position_ids"), "does not fit .* in position_ids"),
        (lambda c: engine(c)["shapes"].update(logits=[2, 1, 5]), "does not fit .* in logits"),
        (lambda c: c["engines"].pop(), "engines of both graphs for no GPU"),
        (lambda c: c["engines"][0].update(longest=2), "prompts of 5 to 2 tokens"),
        (lambda c: c.update(engines=3), "damaged"),
        (lambda c: c.update(engines=[{}]), "damaged"),
    ],
)
def test_descriptions_that_do_not_fit(
    copied: Path, make: Make, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    edit(copied, change)
    refuses(make, copied, says)


def test_engines_that_are_not_what_the_description_says(copied: Path, make: Make) -> None:
    driver = Driver(copied)
    engine(driver.content)["inputs"][POS] = "float32"
    with pytest.raises(EngineError, match=f"not the engine that arkv.json tells of: .* {POS}"):
        make(copied, driver=driver)
    (copied / "decode.SM89.engine").write_bytes(b"something else")
    refuses(make, copied, "not the engine that was exported")
    edit(copied, lambda c: c["files"].update(sizes(copied)))
    refuses(make, copied, r"decode.SM89.engine: TensorRT cannot load it: no engine of mine")


def sizes(folder: Path) -> dict[str, Any]:
    return {"decode.SM89.engine": said_of(folder / "decode.SM89.engine")}


def test_signing_leaves_engines_as_they_were(copied: Path, make: Make) -> None:
    sign(copied)
    session, _ = make(copied)
    assert session.generate(IDS, 2).shape == (2, 2)
    (copied / "decode.SM89.engine").write_bytes(b"something else")
    sign(copied)
    refuses(make, copied, "not the engine that was exported")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"folder": 3}, "folder=3: give a path"),
        ({"device": -1}, "device=-1"),
        ({"device": True}, "device=True"),
        ({"device": 1}, "there are 1 GPUs, counted from 0"),
        ({"cuda_graph": 1}, "cuda_graph=1"),
    ],
)
def test_sessions_are_not_made_of_anything(make: Make, options: dict[str, Any], says: str) -> None:
    driver = Driver(cases.engines("llama"))
    with pytest.raises(EngineError, match=says):
        make(**{"folder": cases.engines("llama"), "driver": driver, **options})


@pytest.mark.parametrize("module", ["cuda.bindings.runtime", "tensorrt_rtx"])
def test_packages_that_are_missing_are_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    name = {"tensorrt_rtx": "tensorrt-rtx"}.get(module, "cuda-bindings")
    with pytest.raises(EngineError, match=rf"needs {name} .*arkv-fx\[tensorrt\]"):
        EngineSession(cases.engines("llama"))


def test_a_machine_without_a_gpu_is_told_so() -> None:
    from cuda.bindings import runtime

    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="engines need an NVIDIA GPU and its driver: cudaGet"):
        EngineSession(cases.engines("llama"))


def test_that_a_folder_holds_no_engines_is_said_first(copied: Path) -> None:
    """Before anything is to be installed, or a GPU bought."""
    edit(copied, lambda c: c.pop("engines"))
    with pytest.raises(EngineError, match=r"engines of both graphs.*`arkv export MODEL"):
        EngineSession(copied)
