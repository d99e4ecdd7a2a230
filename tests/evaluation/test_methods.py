"""Methods: equal bytes, overrides in the name, refusals."""

import pytest

from arkv_fx.errors import ConfigError, UnknownOptionError
from arkv_fx.evaluation.methods import METHODS, FullCache, Setting, get_method, make_config
from arkv_fx.models import random_model
from arkv_fx.plan import plan_layer

SETTING = Setting(context=2048, steps=8, layer_bytes=2048 * 2 * 32 * 2 // 4)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_full_cache_is_counted_in_bf16(arch: str) -> None:
    model = random_model(arch)
    heads = 2 if arch == "llama" else 4
    full = FullCache.of(model)
    assert full.layers == (heads * 32 * 2,) * 2
    assert full.per_layer(100) == 100 * heads * 32 * 2
    assert full.nbytes(100) == 2 * full.per_layer(100)


def test_sliding_layers_never_hold_more_than_their_window() -> None:
    full = FullCache.of(random_model("gemma3"))
    assert full.windows == (16, 0)
    assert full.nbytes(100) == (16 + 100) * 2 * 32 * 2


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.sized])
def test_sized_methods_use_their_bytes_and_no_more(name: str) -> None:
    import torch

    config = make_config(name, SETTING)
    plan = plan_layer(config, heads=2, k_dim=16, v_dim=16, dtype=torch.bfloat16)
    assert 0.95 * SETTING.layer_bytes < plan.nbytes() <= SETTING.layer_bytes


def test_other_methods_have_their_own_size() -> None:
    assert make_config("paper-512", SETTING).budget == 512
    full = make_config("full", SETTING)
    assert full.budget is not None and full.budget >= 2056
    assert full.tiers == ("native",)


def test_only_some_methods_take_the_calibration() -> None:
    taking = {name for name in METHODS if get_method(f"{name}:window=8").calibrated}
    assert taking == {"default", "evict-calibrated"}


def test_overrides_follow_the_name() -> None:
    config = make_config("default:tiers=int8+int4,oq_ratio=0.2,score.decay=0.9", SETTING)
    assert config.tiers == ("int8", "int4")
    assert config.oq_ratio == 0.2
    assert dict(config.score_options)["decay"] == 0.9
    assert config.bytes == SETTING.layer_bytes
    assert make_config("default:score=novelty", SETTING).score == "novelty"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("best", UnknownOptionError, "known: full, evict"),
        ("default:colour=1", UnknownOptionError, "colour"),
        ("default:tiers=int5", UnknownOptionError, "int5"),
        ("default:window", ConfigError, "not option=value"),
        ("default:window=0", ConfigError, "window=0"),
    ],
)
def test_refusals(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_config(name, SETTING)
