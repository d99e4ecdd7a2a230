"""One prefill for many methods: the states are those of each method's own prefill."""

import pytest
import torch

from arkv_fx import ArkvCache, ArkvConfig, transform
from arkv_fx.errors import ConfigError, TransformError
from arkv_fx.evaluation.shared_prefill import Contest
from arkv_fx.models import random_model

IDS = torch.randint(0, 128, (2, 90), generator=torch.Generator().manual_seed(0))
NEXT = torch.tensor([[5], [6]])
SMALL = {"window": 8, "sinks": 2, "round_to": 1}
CONFIGS = {
    "first": ArkvConfig(budget=40, tiers=("int8", "int4"), **SMALL),
    "evict": ArkvConfig(budget=30, tiers=("bf16",), score="mass", **SMALL),
    "paper": ArkvConfig.paper(40, window=8),
    "full": ArkvConfig(budget=120, tiers=("native",), **SMALL),
}


def held(cache: ArkvCache) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in cache.tensors().items() if name != "handle"}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert torch.equal(left[name], tensor), name


def test_fed_states_are_those_of_a_direct_prefill() -> None:
    model = random_model("llama")
    with Contest(model, CONFIGS) as contest:
        logits, caches = contest.prefill(IDS)
        shared = held(caches["evict"])
        later = {name: contest.step(name, NEXT, cache) for name, cache in caches.items()}
    torch.testing.assert_close(logits, model(IDS, logits_to_keep=1).logits[:, -1])
    assert not torch.equal(later["evict"], later["full"])
    transform(model, CONFIGS["evict"], compile="eager")
    own = ArkvCache(model)
    model(input_ids=IDS, past_key_values=own, logits_to_keep=1)
    assert_same(shared, held(own))
    assert torch.equal(later["evict"], model(NEXT, past_key_values=own).logits[:, -1])


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_fed_states_are_those_of_a_prefill_alone(arch: str) -> None:
    with Contest(random_model(arch), CONFIGS) as contest:
        _, caches = contest.prefill(IDS)
        for name in CONFIGS:
            _, alone = contest.prefill(IDS, [name])
            assert_same(held(caches[name]), held(alone[name]))
        _, longer = contest.prefill(torch.cat([IDS, IDS], 1), ["full", "paper"])
    assert list(longer) == ["full", "paper"]
    assert longer["paper"].seen == 180
    assert contest.graphs == 1  # traced once for all methods and lengths


def test_the_model_is_restored_after_an_error() -> None:
    model = random_model("llama", head_dim=12)
    odd = {"odd": ArkvConfig(budget=64, tiers=("k4v3",))}
    with pytest.raises(ConfigError, match=r"12 .* multiple of 8"), Contest(model, odd) as it:
        it.prefill(IDS)
    assert not hasattr(model, "arkv")


def test_refusals() -> None:
    model = random_model("llama")
    with pytest.raises(ConfigError, match="no method"):
        Contest(model, {})
    with Contest(model, CONFIGS), pytest.raises(TransformError, match="restore"):
        Contest(model, CONFIGS)


def test_compiled_methods_answer_as_eager_ones() -> None:
    """The probe in their graphs is Python and is left out of what is compiled."""
    answers = []
    for compile in ("eager", "inductor"):
        chosen = {name: CONFIGS[name] for name in ("first", "evict")}
        with Contest(random_model("llama"), chosen, compile=compile) as contest:
            _, caches = contest.prefill(IDS)
            answers.append([contest.step(n, NEXT, cache) for n, cache in caches.items()])
    for eager, compiled in zip(*answers, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
