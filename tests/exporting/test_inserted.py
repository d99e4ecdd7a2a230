"""Models that know no cache, exported with one: the graphs answer as the full forward does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models_outside.alibi_gpt import AlibiGPT
from models_outside.encoder_decoder import Transformer
from models_outside.nano_gpt import GPT, GPTConfig
from models_outside.sample import TOLERANCE, TOTAL, ids, random_weights
from torch import nn

import arkv_fx
from arkv_fx import ArkvCache, ArkvConfig
from arkv_fx.errors import EngineError, ExportError, TransformError
from arkv_fx.runtime import OnnxSession

WHOLE = ArkvConfig(budget=64, window=4, sinks=2, tiers=("native",))
SMALL = ArkvConfig(budget=24, window=4, sinks=2, tiers=("int8", "int4"))


def gpt() -> nn.Module:
    torch.manual_seed(0)  # for the biases
    return random_weights(GPT(GPTConfig()))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> OnnxSession:
    out = tmp_path_factory.mktemp("inserted") / "e"
    return OnnxSession(arkv_fx.export(gpt(), None, out, config=WHOLE, insert_cache=True))


@pytest.mark.parametrize("prompt", [2, 20])
def test_bit_by_bit_is_the_full_forward(session: OnnxSession, prompt: int) -> None:
    """Prompts shorter than the window begin token by token."""
    model, tokens = gpt(), ids(1)
    for length in (prompt, *range(prompt + 1, TOTAL + 1)):
        new = tokens[:, length - 1].numpy()
        found = session.prefill(tokens[:, :length].numpy()) if length == prompt else (
            session.step(new)
        )  # fmt: skip
        with torch.no_grad():
            expected = model(tokens[:, :length])[0][:, -1].numpy()
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max(), length
    # Negative control: a sequence of the last token alone.
    assert np.abs(session.prefill(tokens[:, -1:].numpy()) - expected).max() > 0.01


def test_evicting_graphs_say_what_the_transformed_model_says(tmp_path: Path) -> None:
    model, tokens = gpt(), ids(2)
    out = arkv_fx.export(model, None, tmp_path / "e", config=SMALL, insert_cache=True, batch=2)
    assert "cache" not in model.__dict__ and not hasattr(model, "arkv"), "left transformed"
    opened = OnnxSession(out)
    arkv_fx.transform(model, SMALL, insert_cache=True, compile="reference")
    cache = ArkvCache(model)
    with torch.no_grad():
        expected = [model(tokens[:, :20], cache=cache)[0][:, -1]]
        expected += [model(tokens[:, i : i + 1], cache=cache)[0][:, -1] for i in range(20, TOTAL)]
    found = [opened.prefill(tokens[:, :20].numpy())]
    found += [opened.step(tokens[:, i].numpy()) for i in range(20, TOTAL)]
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b.numpy()).max() <= 1e-3 * b.abs().max()
    assert opened.nbytes == sum(t.nbytes for t in opened.state().values())


def test_what_it_cannot_do_is_refused_by_name(session: OnnxSession) -> None:
    tokens = ids(1).numpy()
    with pytest.raises(EngineError, match="takes no padding"):
        session.prefill(tokens, np.array([[0] * 3 + [1] * (TOTAL - 3)]))
    with pytest.raises(EngineError, match="65 tokens: the model knows positions for 64 only"):
        session.prefill(np.tile(tokens, 2)[:, :65])
    session.prefill(np.tile(tokens, 2)[:, :64])
    with pytest.raises(EngineError, match="positions for 64 only"):
        session.step(tokens[:, 0])


@pytest.mark.parametrize(
    "model, error, says",
    [
        (AlibiGPT, ExportError, "a bias by position"),
        (Transformer, TransformError, "missing|argument|traced"),
        (lambda: nn.Linear(4, 4), ExportError, "no embedding"),
    ],
)
def test_models_that_cannot_be_exported(
    model: type[nn.Module], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        arkv_fx.export(model().eval(), None, tmp_path / "e", config=SMALL, insert_cache=True)
    assert not any(tmp_path.iterdir())
