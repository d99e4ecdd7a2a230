"""``generate()`` of a transformed model with room for everything: as before, in all its ways."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from generation_cases import CASES, CROPS, REFUSED, Result, inputs
from transformers import PreTrainedModel

from arkv_fx import ArkvCache, ArkvConfig, transform
from arkv_fx.errors import CacheError
from arkv_fx.zoo.configs import tiny_model

MODELS = (
    "llama", "qwen3", "gemma3_text", "gpt2", "mixtral", "t5:seq2seq", "whisper:speech",
)  # fmt: skip
QUICK = ("llama", "t5:seq2seq")
DEAR = ("prompt in chunks", "all logits", "guidance", "hidden states", "no cache")
"""Cases that need graphs of their own; of these only one is quick."""
ROOMY = ArkvConfig(budget=128, tiers=("native", "native"))
TOLERANCE = 1e-4


@lru_cache(maxsize=1)
def both(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model as it is, and transformed."""
    torch._dynamo.reset()
    plain = tiny_model(name)
    plain.zoo_name = name  # type: ignore[assignment]
    model: Any = transform(copy.deepcopy(plain), ROOMY, compile="eager")
    return plain, model


@pytest.fixture(autouse=True, scope="module")
def nothing_stays() -> Iterator[None]:
    yield
    both.cache_clear()


def params(cases: Any) -> list[Any]:
    """(model, case), one model after the other; most models are slow, and what is dear."""
    quick = {(name, case) for name in QUICK for case in cases if case not in DEAR}
    quick.add(("t5:seq2seq", "prompt in chunks"))
    return [
        pytest.param(name, case, marks=() if (name, case) in quick else pytest.mark.slow)
        for name in MODELS
        for case in cases
    ]


def compare(found: Result, expected: Result) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        assert other.shape == value.shape, f"{name}: {other.shape}, not {value.shape}"
        if not value.is_floating_point():
            assert torch.equal(other, value), f"{name} differ"
            continue
        hidden = value.isinf()
        assert torch.equal(other.isinf(), hidden), f"{name}: other tokens are ruled out"
        error = (other - value)[~hidden].abs().max() / value[~hidden].abs().max()
        assert error <= TOLERANCE, f"{name} differ by {error:.1e}"


@pytest.mark.parametrize(("name", "case"), params(CASES))
def test_as_without_a_transform(name: str, case: str) -> None:
    plain, model = both(name)
    try:
        expected = CASES[case](plain)
    except Exception as error:
        assert case != "greedy", f"nothing is tested: {error}"
        pytest.skip(f"nor without a transform: {type(error).__name__}: {str(error)[:200]}")
    if case in CROPS and not ArkvCache(model).is_croppable:
        pytest.skip("the cache cannot be cropped")
    compare(CASES[case](model), expected)


@pytest.mark.parametrize(("name", "case"), params(REFUSED))
def test_refused_by_name(name: str, case: str) -> None:
    _, model = both(name)
    with pytest.raises(CacheError, match=r"arkv_fx\.restore"):
        REFUSED[case](model)


@pytest.mark.parametrize("name", QUICK)
def test_a_lost_token_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one slot is emptied after the prompt."""
    plain, model = both(name)
    expected = CASES["greedy"](plain)
    end_step = ArkvCache.end_step

    def forgets(self: ArkvCache) -> None:
        end_step(self)
        self.session.layers[0].view().ring.pos[:, :, 0] = -1

    monkeypatch.setattr(ArkvCache, "end_step", forgets)
    with pytest.raises(AssertionError, match="differ"):
        compare(CASES["greedy"](model), expected)


def test_a_cache_of_ours_was_used() -> None:
    _, model = both("llama")
    call: Any = model.generate
    out = call(**inputs(model), max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, ArkvCache)
