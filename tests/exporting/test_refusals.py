"""What cannot be exported whole is refused with the reason, before a file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import arkv_fx
from arkv_fx import ArkvConfig
from arkv_fx.errors import (
    ConfigError,
    ExportError,
    TransformError,
    UnknownOptionError,
)
from arkv_fx.models import random_model

SMALL = ArkvConfig(budget=24, window=4, sinks=2, tiers=("int8",))


@pytest.fixture(autouse=True)
def no_graphs_of_the_last_test() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def refuses(model: Any, tmp_path: Path, error: type[Exception], says: str, **options: Any) -> None:
    with pytest.raises(error, match=says):
        arkv_fx.export(model, None, tmp_path / "out", **{"config": SMALL, **options})
    assert not list(tmp_path.iterdir()), "something was written"


def other(kind: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, vocab_size=64, **settings)
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]


def test_a_recurrent_state_is_refused(tmp_path: Path) -> None:
    model = other(
        "qwen3_next", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2, intermediate_size=32, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    refuses(model, tmp_path, ExportError, r"layer\(s\) \[0\] keep a recurrent")


def test_a_bias_that_grows_with_the_text_is_refused(tmp_path: Path) -> None:
    model = other("bloom", hidden_size=32, n_layer=2, n_head=2)
    refuses(model, tmp_path, ExportError, "position_ids")


def test_weights_that_onnx_runtime_cannot_multiply_are_refused(tmp_path: Path) -> None:
    model = random_model("llama", num_hidden_layers=1)
    model.lm_head.bfloat16()  # one is enough
    refuses(model, tmp_path, ExportError, r"has weights in bfloat16.* export model\.float\(\)")


def test_a_window_shorter_than_the_sample_is_refused(tmp_path: Path) -> None:
    """Its steps would have a mask already in the sample, where the graph is to know no length."""
    model = other(
        "mistral", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, intermediate_size=32, sliding_window=8,
    )  # fmt: skip
    refuses(model, tmp_path, ExportError, "attention window of 8 tokens is shorter than the sample")


def test_a_graph_break_is_refused(tmp_path: Path) -> None:
    model = random_model("llama")
    layer = model.model.layers[1].mlp
    forward = layer.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(x)  # type: ignore[no-any-return]

    layer.forward = broken
    refuses(model, tmp_path, ExportError, "LlamaForCausalLM is not one graph")


def reads_the_keys(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    out, _ = plain(module, q, k, v, mask, **options)
    return out + k.mean(), None


def test_attention_that_is_not_fused_is_refused_with_its_path(tmp_path: Path) -> None:
    ALL_ATTENTION_FUNCTIONS.register("reads_the_keys", reads_the_keys)
    model = random_model("llama")
    model.config._attn_implementation = "reads_the_keys"
    refuses(model, tmp_path, ExportError, r"model\.layers\.0\.self_attn: what the cache returns")


def counts_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """Adds what hangs on the cache's length to the logits."""
    forward = model.lm_head.forward
    seen = {}

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        name = "cache" if "cache" in kwargs else "past_key_values"  # before transformers 5.24
        seen["length"] = kwargs[name].get_seq_length()

    model.model.register_forward_pre_hook(remember, with_kwargs=True)
    model.lm_head.forward = lambda x: forward(x) + seen["length"]
    return model


def test_a_step_that_hangs_on_the_cache_length_is_refused(tmp_path: Path) -> None:
    model = counts_tokens(random_model("llama"))
    refuses(model, tmp_path, ExportError, "hangs on the number of tokens before it")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"config": ArkvConfig.paper(64)}, ExportError, "score 'paper'"),
    ],
)
def test_a_configuration_that_cannot_be_exported_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    refuses(random_model("llama"), tmp_path, error, says, **change)


def test_a_head_dimension_that_a_format_cannot_store_is_refused(tmp_path: Path) -> None:
    model = random_model("llama", num_hidden_layers=1, head_dim=12)
    config = SMALL.replace(tiers=("int8", "k4v3"))
    refuses(model, tmp_path, ConfigError, "12 .* multiple of 8", config=config)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"target": "tflite"}, UnknownOptionError, "unknown target 'tflite'.*onnx"),
        ({"opset": 18}, UnknownOptionError, "no option opset"),
        ({"batch": 0}, ExportError, "batch=0"),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    refuses(random_model("llama"), tmp_path, error, says, **change)


@pytest.mark.parametrize(
    ("prepare", "error", "says"),
    [
        (lambda m: m.train(), ExportError, "training mode"),
        (lambda m: arkv_fx.transform(m, compile="reference"), TransformError, "is transformed"),
    ],
)
def test_a_model_in_another_state_is_refused(
    tmp_path: Path, prepare: Callable[[Any], Any], error: type[Exception], says: str
) -> None:
    refuses(prepare(random_model("llama")), tmp_path, error, says)


def test_a_refused_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = random_model("llama")
    refuses(model, tmp_path, ExportError, "paper", config=ArkvConfig.paper(64))
    assert not hasattr(model, "arkv")
    assert "forward" not in model.__dict__


def test_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="not an empty folder"):
        arkv_fx.export(random_model("llama"), None, tmp_path, config=SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
