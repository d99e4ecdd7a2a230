"""What all tests share: one thread, quick hypothesis settings, no graphs from another module."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# The naive attention and the check of what is held serve other folders' tests too.
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("ops", "state")]

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other

# Each compilation logs a trace for tools; pytest would format and keep all of it (it adds handlers
# to loggers that do not propagate).
logging.getLogger("torch.__trace").disabled = True

settings.register_profile(
    "arkv",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("arkv")


@pytest.fixture(autouse=True, scope="session")
def plans_as_asked_for() -> Iterator[None]:
    """No prompt changes the plans that a test expects, nor does what somebody calibrated before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arkv_fx.huggingface.first_prompt.LEAST", 10**9)
        patch.setattr("arkv_fx.transforming.find", lambda model, config: None)
        patch.setattr("arkv_fx.exporting.find", lambda model, config: None)
        yield


@pytest.fixture
def as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prompts calibrate after all, and what they told is found; where it is kept."""
    from arkv_fx import kept

    monkeypatch.setenv("ARKV_CACHE", str(tmp_path))
    monkeypatch.setattr("arkv_fx.transforming.find", kept.find)
    monkeypatch.setattr("arkv_fx.huggingface.first_prompt.LEAST", 256)
    return tmp_path / "calibrations"


@pytest.fixture(autouse=True, scope="module")
def no_graphs_left_over() -> Iterator[None]:
    """Dynamo counts recompilations per code object, and all transformers models share theirs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
