"""What only a GPU can tell: Triton kernels, CUDA graphs and engines as they run there."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_attention import TOLERANCE
from torch import Tensor

from arkv_fx import ArkvConfig, export, models, restore, transform
from arkv_fx.evaluation.bench.cases import CASES, Options, filled, new_token
from arkv_fx.exporting.tensorrt_target import FP8_FROM
from arkv_fx.formats import FORMATS
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.runtime import EngineSession, OnnxSession
from arkv_fx.runtime.cuda_device import CudaDevice
from arkv_fx.runtime.engine_files import CAPABILITIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")
SMALL = ArkvConfig(budget=48, window=8, sinks=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tier", sorted(FORMATS))
@pytest.mark.parametrize("batch", [1, 8])
def test_triton_is_the_reference(tier: str, dtype: torch.dtype, batch: int) -> None:
    case = CASES["llama-3-8b"]
    options = Options(dtype=dtype, device=CUDA, batch=batch, tiers=("native", tier))
    plan = options.plan(case, 1024)
    token = new_token(case, options)
    state = filled(plan, 4, 1500, batch, CUDA)
    outs: dict[str, Tensor] = {}
    for kernel in ("reference", "triton"):
        own = state.clone().tensors
        out = attend(*token, None, own, plan, Knobs(case.scale), False, kernel)
        outs[kernel] = out.float()
    # Outputs are means of a thousand values of about 1 each.
    error = (outs["triton"] - outs["reference"]).abs().max()
    assert error <= TOLERANCE[dtype]


CALLS: dict[str, dict[str, Any]] = {
    "one": {"batch": 1},
    "batch": {"batch": 3},
    "padding": {"batch": 2, "padded": 7},
    "beams": {"batch": 1, "num_beams": 3},
}


def generate(model: Any, batch: int, padded: int = 0, **options: Any) -> list[list[int]]:
    ids = torch.randint(1, 128, (batch, 60), generator=torch.Generator().manual_seed(0)).to(CUDA)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    with torch.no_grad():
        out: Tensor = model.generate(
            ids, attention_mask=mask, max_new_tokens=30, do_sample=False, **options
        )
    return out.tolist()


def test_replayed_steps_answer_as_those_that_run() -> None:
    model = models.random_model("llama").to(CUDA)
    transform(model, SMALL, compile="inductor")
    want = {name: generate(model, **call) for name, call in CALLS.items()}
    restore(model)
    transform(model, SMALL, compile="reduce-overhead")
    for _ in range(2):
        for name, call in CALLS.items():
            assert generate(model, **call) == want[name], name
    replays = model.arkv.backend.replays
    assert sum(r.replayed for r in replays) > 100
    assert not any(r.reason for r in replays)


def test_sequence_after_sequence_takes_no_more_memory() -> None:
    model = models.random_model("llama").to(CUDA)
    transform(model, SMALL, compile="reduce-overhead")
    used = []
    for _ in range(6):
        generate(model, 1)
        gc.collect()
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved())
    assert len(set(used[2:])) == 1


def test_compiled_and_eager_agree() -> None:
    model = models.random_model("llama").to(CUDA)
    found = []
    for lowering in ("reference", "eager", "inductor"):
        transform(model, SMALL, compile=lowering)
        ids = torch.arange(1, 61, device=CUDA)[None]
        with torch.no_grad():
            out = model(ids, use_cache=True)
            for token in range(20):
                step = torch.tensor([[token + 1]], device=CUDA)
                out = model(step, past_key_values=out.past_key_values)
        found.append(out.logits)
        restore(model)
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=1e-3, atol=1e-3)


def test_bench_runs_there() -> None:
    from arkv_fx.evaluation.bench import bench

    options = Options(
        cases=(CASES["smollm2"],), dtype=torch.bfloat16, device=CUDA, slots=128, contexts=(256,),
        rounds=2, prompt=256,
    )  # fmt: skip
    rows = bench(("attention", "update", "prefill"), options, lambda text: None)
    assert any(r.method.startswith("arkv-triton") and r.median_us for r in rows)


@pytest.fixture(scope="module", params=[("int8", "int4"), ("k8v4", "k4v3"), ("fp8",)], ids=str)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ArkvConfig]:
    """A folder with engines for this GPU, and the configuration that it was exported with."""
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings.runtime")
    here = CudaDevice().capability
    if here not in CAPABILITIES:
        pytest.skip(f"TensorRT for RTX builds no engines for {here}")
    if request.param == ("fp8",) and int(here.removeprefix("SM")) < FP8_FROM:
        pytest.skip(f"{here} has no fp8")
    config = SMALL.replace(tiers=request.param, context=2**15)
    out = tmp_path_factory.mktemp("engine") / "e"
    options: dict[str, Any] = {"capabilities": [here], "longest": 64}
    export(models.random_model("llama"), None, out, "tensorrt", config=config, batch=3, **options)
    return out, config


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_engines_answer_as_torch(engine: tuple[Path, ArkvConfig], cuda_graph: bool) -> None:
    folder, config = engine
    model = models.random_model("llama").to(CUDA)
    transform(model, config, compile="reference")
    want = [row[60:] for row in generate(model, 3)]
    session = EngineSession(folder, cuda_graph=cuda_graph)
    ids = torch.randint(1, 128, (3, 60), generator=torch.Generator().manual_seed(0)).numpy()
    for _ in range(2):
        assert session.generate(ids, 30, stop=[]).tolist() == want
    assert bool(session._graphs) == cuda_graph


def test_an_engine_session_is_onnx_runtimes_twin(engine: tuple[Path, ArkvConfig]) -> None:
    """Short prompts, and a state that goes from one to the other."""
    session, twin = EngineSession(engine[0]), OnnxSession(engine[0])
    ids = torch.randint(1, 128, (3, 4), generator=torch.Generator().manual_seed(1)).numpy()
    assert session.generate(ids, 20).tolist() == twin.generate(ids, 20).tolist()
    twin.set_state(session.state(), [23] * 3)
    for token in range(10):
        logits = [s.step([token + 1] * 3) for s in (session, twin)]
        assert abs(logits[0] - logits[1]).max() < 1e-2


def test_engine_sessions_give_their_memory_back(engine: tuple[Path, ArkvConfig]) -> None:
    used = []
    for _ in range(4):
        EngineSession(engine[0]).generate([[1, 2, 3]] * 3, 8)
        gc.collect()
        used.append(torch.cuda.mem_get_info()[0])
    assert len(set(used[1:])) == 1
