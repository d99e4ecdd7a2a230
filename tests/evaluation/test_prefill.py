"""One prefill for many methods: the states are those of each method's own prefill."""

import pytest
import torch

from arkv_fx import ArkvCache, ArkvConfig, restore, transform
from arkv_fx.errors import ConfigError, TransformError
from arkv_fx.evaluation.prefill import Contest
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


def direct(arch: str, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """State and next logits of one method through a transformed model of its own."""
    model = random_model(arch)
    transform(model, CONFIGS[name], compile="eager")
    cache = ArkvCache(model)
    model(input_ids=IDS, past_key_values=cache, logits_to_keep=1)
    held = {n: t.clone() for n, t in cache.tensors().items() if n != "handle"}
    logits = model(input_ids=NEXT, past_key_values=cache).logits[:, -1]
    restore(model)
    return held, logits


@pytest.mark.parametrize(
    ("arch", "checked"), [("llama", ["evict", "paper"]), ("gemma3", ["evict"])]
)
def test_fed_states_are_those_of_a_direct_prefill(arch: str, checked: list[str]) -> None:
    model = random_model(arch)
    with Contest(model, CONFIGS) as contest:
        logits, caches = contest.prefill(IDS)
        held = {
            name: {n: t.clone() for n, t in cache.tensors().items() if n != "handle"}
            for name, cache in caches.items()
        }
        later = {name: contest.step(name, NEXT, cache) for name, cache in caches.items()}
    torch.testing.assert_close(logits, model(IDS, logits_to_keep=1).logits[:, -1])
    for name in checked:
        expected, expected_logits = direct(arch, name)
        assert held[name].keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(held[name][key], tensor), (name, key)
        assert torch.equal(later[name], expected_logits), name
    assert not torch.equal(later["evict"], later["full"])


def test_some_methods_at_a_time_and_prompts_of_several_lengths() -> None:
    model = random_model("llama")
    with Contest(model, CONFIGS) as contest:
        _, both = contest.prefill(IDS)
        _, one = contest.prefill(IDS, ["evict"])
        _, longer = contest.prefill(torch.cat([IDS, IDS], 1), ["full", "paper"])
        graphs = len(contest.model.arkv.backend.sites)
    assert (list(one), list(longer)) == (["evict"], ["full", "paper"])
    assert longer["paper"].seen == 180
    for key, tensor in both["evict"].tensors().items():
        assert key == "handle" or torch.equal(one["evict"].tensors()[key], tensor)
    assert graphs <= 6  # at most two captured graphs, rewritten for the methods that ran first


def test_attention_that_is_not_rewritten_keeps_everything_in_every_cache() -> None:
    model = random_model("llama", attn_implementation="eager")
    expected = model(torch.cat([IDS, NEXT], 1)).logits[:, -1]
    with Contest(model, CONFIGS) as contest:
        _, caches = contest.prefill(IDS)
        for name, cache in caches.items():
            torch.testing.assert_close(
                contest.step(name, NEXT, cache), expected, rtol=1e-3, atol=1e-4
            )
            assert cache.session.plain[0].tensors[0].shape[-2] == 91


def test_the_model_is_restored_after_an_error() -> None:
    model = random_model("llama")
    small = {"tiny": ArkvConfig(bytes=100)}
    with pytest.raises(ConfigError, match="does not hold the window"), Contest(model, small) as it:
        it.prefill(IDS)
    assert not hasattr(model, "arkv")


def test_refusals() -> None:
    model = random_model("llama")
    with pytest.raises(ConfigError, match="no method"):
        Contest(model, {})
    with Contest(model, CONFIGS), pytest.raises(TransformError, match="restore"):
        Contest(model, CONFIGS)
