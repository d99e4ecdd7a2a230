"""Options of every kind: taken as what is meant, or refused by name where they are given."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import arkv_fx
from arkv_fx import ArkvConfig
from arkv_fx.calibrating.samples import read_samples
from arkv_fx.config import NUMBERS
from arkv_fx.errors import CalibrationError, ConfigError, UnknownOptionError
from arkv_fx.models import random_model

FIELDS = {f.name: f for f in dataclasses.fields(ArkvConfig)}
SCALARS: list[Any] = [
    None, "", "64", b"1", True, False, float("nan"), float("inf"), -float("inf"), 2.0, 2.5, 1j,
    -1, 0, 1, 64, 10**30, 10**400, np.int16(40), np.float32(2), np.float64("nan"), np.bool_(True),
    torch.tensor(40), torch.tensor(2.5), torch.tensor(True), torch.empty((), device="meta"),
    Fraction(5, 2), object(), len, ArkvConfig, np.array(3), np.array([1, 2]), torch.ones(2, 2),
]  # fmt: skip
scalars = st.one_of(st.sampled_from(SCALARS), st.integers(), st.floats(), st.text(max_size=3))
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=4),
    st.tuples(scalars, scalars, scalars),
    st.dictionaries(st.text(max_size=2), scalars, max_size=2),
)


@settings(max_examples=1500)
@given(name=st.sampled_from(sorted(FIELDS)), value=values)
def test_any_value_is_taken_as_what_is_meant_or_refused_by_name(name: str, value: Any) -> None:
    try:
        config = ArkvConfig(**{name: value})
    except ConfigError as error:
        assert name.removesuffix("_options") in str(error), "which option it was"
        assert len(str(error)) < 400 and "\n" not in str(error)
        return
    hash(config)
    assert ArkvConfig.make(config.to_dict()) == config
    taken = getattr(config, name)
    if name in NUMBERS and taken is not None:
        assert type(taken) is (
            float if name in ("compression", "oq_ratio", "eviction_share") else int
        )
        assert value is None or taken == value or taken == pytest.approx(float(value))


@pytest.mark.parametrize("number", [np.int64(64), np.uint8(64), torch.tensor(64), np.array(64)])
@pytest.mark.parametrize("name", ["context", "budget", "bytes", "window", "sinks", "round_to"])
def test_scalars_of_other_libraries_are_whole_numbers(name: str, number: Any) -> None:
    options = {"budget": 1000} if name in ("window", "sinks", "round_to") else {}
    config = ArkvConfig(**{**options, name: number})
    assert getattr(config, name) == 64 and type(getattr(config, name)) is int


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 2.5}, r"window=2\.5: must be >= 1 .*whole number of tokens"),
        ({"sinks": True}, "sinks=True: must be >= 0 .*whole number"),
        ({"budget": "64"}, "budget='64': must be .*whole number"),
        ({"context": 2**31}, "context=2147483648: must be .*<= 2147483647"),
        ({"compression": "4"}, "compression='4': must be >= 1, a finite number"),
        ({"oq_ratio": None}, "oq_ratio=None: must be between 0 and 1"),
        ({"tiers": "int8"}, r"tiers='int8': must be one or two format names.*\('int8', 'int4'\)"),
        ({"tiers": ("int8", 4)}, "tiers=4 is of type int"),
        ({"tiers": {"int8", "int4"}}, "tiers=.*in a row"),
        ({"taus": None}, "taus=None: must be three numbers"),
        ({"taus": (1, 2, "x")}, r"taus=\(1, 2, 'x'\): must be three numbers > 0"),
        ({"score_options": {"decay": "x"}}, "score_options decay='x': must be a finite number"),
        ({"score_options": ["decay"]}, r"score_options=\['decay'\]: must be numbers by name"),
        ({"score_options": [("decay", 0.9), ("decay", 0.5)]}, "score_options=.*each name once"),
        ({"score": ["mass"]}, r"score=\['mass'\] is of type list: give one of combined, mass"),
        ({"calibration": None}, "calibration=None: choose 'output'"),
        ({"budget": 64, "round_to": 100}, "round_to=100: must be no more than budget=64"),
    ],
)
def test_what_is_refused_says_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ArkvConfig(**options)


def test_mappings_and_names() -> None:
    with pytest.raises(ConfigError, match="options=3 is of type int: give a mapping"):
        ArkvConfig.make(3)  # type: ignore[arg-type]
    with pytest.raises(UnknownOptionError, match=r"unknown option 1, bugdet; known"):
        ArkvConfig.make({"bugdet": 1, 1: 2})  # type: ignore[dict-item]
    with pytest.raises(UnknownOptionError, match="unknown option bugdet; known"):
        ArkvConfig().replace(bugdet=1)
    with pytest.raises(UnknownOptionError, match="unknown preset 3"):
        arkv_fx.preset(3)  # type: ignore[arg-type]
    assert ArkvConfig(score="mass", score_options={"age": True}).score_options == (("age", 1.0),)  # type: ignore[arg-type]


def test_round_to_that_leaves_nothing_is_said() -> None:
    from arkv_fx.plan import plan_layer

    shape: dict[str, Any] = {"heads": 2, "k_dim": 16, "v_dim": 16, "dtype": torch.float32}
    with pytest.warns(UserWarning, match="round_to=5000 leaves nothing of the .* lower round_to"):
        assert plan_layer(ArkvConfig(bytes=40_000, round_to=5000), **shape).slots == 36
    assert plan_layer(ArkvConfig(bytes=40_000), **shape).slots > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"budget": 64}}, "config={'budget': 64} is of type dict: give an ArkvConfig"),
        ({"calibration": "c.json"}, r"calibration='c.json' is of type str: .*Calibration\.load"),
        ({"compile": None}, "compile=None is of type NoneType: give 'inductor'"),
        ({"insert_cache": "no"}, "insert_cache='no' is of type str: give True or False"),
        ({"sample": 3}, "sample: it says how to call a model with insert_cache=True"),
    ],
)
def test_transform_names_an_argument_of_another_type(
    arguments: dict[str, Any], message: str
) -> None:
    model = random_model("llama", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=message):
        arkv_fx.transform(model, **arguments)
    assert not hasattr(model, "arkv")


IDS = torch.ones(1, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        ("text", None, r"input_ids='text': give a tensor \[B, T\]"),
        ({"input_ids": IDS}, None, r"input_ids is a dict: .*encoding\['input_ids'\]"),
        ([], None, "0 prompts"),
        ([[1, 2, 3]], None, r"input_ids=\[1, 2, 3\]: give a tensor"),
        (IDS[0], None, r"input_ids: a prompt has shape \(8,\)"),
        (IDS[:0], None, r"shape \(0, 8\)"),
        ([IDS, IDS[:, :1]], None, r"input_ids\[1\]: a prompt has shape \(1, 1\)"),
        (IDS.float(), None, "input_ids is torch.float32: token ids are torch.int64"),
        (IDS.to("meta"), None, r"input_ids is on meta and the model on cpu: call .*to\('cpu'\)"),
        (IDS * 128, None, "token id 128: the model has a vocabulary of 128"),
        (-IDS, None, "token id -1: the model has a vocabulary"),
        (IDS, IDS[:, 1:], r"mask of input_ids is \(1, 7\): give a tensor \(1, 8\)"),
        (IDS, "mask", "mask='mask': give a tensor"),
        (IDS, [IDS, IDS], "1 prompts and 2 attention masks"),
        (IDS, IDS * 0, "hides every token"),
    ],
)
def test_a_sample_that_is_no_prompt_of_the_model_is_refused(
    prompts: Any, mask: Any, message: str
) -> None:
    model = random_model("llama", num_hidden_layers=1)
    with pytest.raises(CalibrationError, match=message):
        arkv_fx.calibrate(model, prompts, attention_mask=mask)
    assert not hasattr(model, "arkv")


def test_a_sample_beyond_a_table_of_positions_is_refused() -> None:
    model = random_model("gpt2", num_hidden_layers=1, max_position_embeddings=64)
    long = IDS.repeat(1, 9)
    with pytest.raises(CalibrationError, match="72 tokens, and the model has positions for 64"):
        arkv_fx.calibrate(model, long)
    read_samples(random_model("llama", max_position_embeddings=64), long, None)  # it rotates


def test_what_a_sample_may_be() -> None:
    model = random_model("llama", num_hidden_layers=1)
    assert read_samples(model, IDS.int(), IDS.bool())[0][0].dtype == torch.int32
    assert [mask for _, mask in read_samples(model, (IDS, IDS), IDS)] == [IDS, IDS]
    assert read_samples(model, [IDS], None)[0][1] is None


def test_calibrate_names_what_else_is_wrong() -> None:
    model = random_model("llama", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"config=\{\} is of type dict"):
        arkv_fx.calibrate(model, IDS, {})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model='smollm2' is of type str"):
        arkv_fx.calibrate("smollm2", IDS)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"call model.eval\(\)"):
        arkv_fx.calibrate(model.train(), IDS)
