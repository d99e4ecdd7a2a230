"""What wants to copy, save or trace a transformed model is told what to call instead."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import arkv_fx
from arkv_fx import ArkvConfig
from arkv_fx.errors import TransformError
from arkv_fx.huggingface import compiled
from arkv_fx.models import random_model

CONFIG = ArkvConfig(budget=64, window=8)
IDS = torch.arange(1, 21)[None]


@pytest.fixture(scope="module", params=["new", "after a run"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = arkv_fx.transform(random_model("llama", num_hidden_layers=1), CONFIG, compile="eager")
    if request.param != "new":
        model.generate(IDS, max_new_tokens=2)  # type: ignore[operator]
    return model  # type: ignore[return-value]


@pytest.mark.parametrize(
    "save", [pickle.dumps, lambda model: torch.save({"model": model}, io.BytesIO())]
)
def test_saving_it_whole(model: PreTrainedModel, save: Callable[[Any], Any]) -> None:
    with pytest.raises(TransformError, match=r"neither pickled.*save_pretrained.*restore\(model\)"):
        save(model)


CAPTURES: dict[str, Callable[[nn.Module], Any]] = {
    "export": lambda model: torch.export.export(model, (IDS,), strict=False),
    "strict": lambda model: torch.export.export(model, (IDS,), strict=True),
    "onnx": lambda model: torch.onnx.export(model, (IDS,), io.BytesIO(), dynamo=False),
    "trace": lambda model: torch.jit.trace(model, (IDS,), strict=False),
    "script": torch.jit.script,
    "fullgraph": lambda model: torch.compile(model, backend="eager", fullgraph=True)(IDS),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CAPTURES)
def test_capturing_it(model: PreTrainedModel, name: str) -> None:
    torch._dynamo.reset()  # it may know the forward from a call that allowed breaks
    # Dynamo wraps what it cannot trace in an error of its own, with our reason in it.
    error = Exception if name in ("strict", "fullgraph") else TransformError
    with pytest.raises(error, match=r"compiled already(.|\n)*restore(.|\n)*arkv_fx.export\("):
        CAPTURES[name](model)
    assert torch.compile(model, backend="eager")(IDS).logits.isfinite().all()


def test_its_weights_are_the_models(model: PreTrainedModel, tmp_path: Path) -> None:
    plain = random_model("llama", num_hidden_layers=1).state_dict()
    model.save_pretrained(tmp_path)
    for weights in (
        model.state_dict(),
        AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(),
    ):
        assert weights.keys() == plain.keys()
        assert all(torch.equal(weights[name], plain[name]) for name in plain)


def test_after_restore_all_of_it_works() -> None:
    model = random_model("llama", num_hidden_layers=1)
    kept = set(vars(model))
    arkv_fx.restore(arkv_fx.transform(model, CONFIG, compile="eager"))
    assert set(vars(model)) == kept
    assert pickle.loads(pickle.dumps(copy.deepcopy(model)))(IDS).logits.isfinite().all()


def test_a_sharded_model_is_refused_by_name() -> None:
    class FSDPModule:
        """What fully_shard mixes into the class of a module, by its name."""

    model = random_model("llama", num_hidden_layers=1)
    block = model.model.layers[0]
    block.__class__ = type("FSDPLayer", (FSDPModule, type(block)), {})
    with pytest.raises(TransformError, match=r"model.layers.0 is sharded by FSDP.*tp_plan"):
        arkv_fx.transform(model, CONFIG)
    assert not hasattr(model, "arkv")


def test_options_of_torch_compile_are_those_of_a_configuration() -> None:
    """Its ``calibration`` is how one is made, and no ``Calibration``."""
    model = random_model("llama", num_hidden_layers=1)
    options = {**CONFIG.to_dict(), "compile": "eager"}
    run = torch.compile(model, backend="arkv", options=options)
    with torch.no_grad():
        assert run(input_ids=IDS, use_cache=True).logits.isfinite().all()
    for wrong, says in (("best", "calibration='best': choose"), (3, "calibration=3 is of type")):
        run = torch.compile(lambda x: x + 1, backend="arkv", options={"calibration": wrong})
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=says):
            run(IDS)


def test_too_many_batch_sizes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "RECOMPILE_LIMIT", 2)
    model = arkv_fx.transform(random_model("llama", num_hidden_layers=1), CONFIG, compile="eager")
    with torch.no_grad(), pytest.raises(TransformError, match=r"batch size.*few batch sizes"):
        for batch in range(1, 5):
            model(input_ids=IDS.repeat(batch, 1), use_cache=True)
    assert batch == 3
