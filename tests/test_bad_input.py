"""What must not be silent: each misuse is a named error with advice, or has a defined result."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)

import arkv_fx
from arkv_fx import ArkvCache, ArkvConfig, Calibration, models, preset, restore, transform
from arkv_fx.compile import backend
from arkv_fx.compile.backend import ArkvBackend, arkv_backend
from arkv_fx.errors import (
    AbsorbedCacheError,
    ArkvError,
    CacheError,
    CalibrationError,
    ConfigError,
    NonFiniteError,
    TransformError,
    UnknownOptionError,
    UnsupportedFormatError,
)
from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.plan import LayerPlan, Tier
from arkv_fx.state.session import LayerState, check_finite
from arkv_fx.zoo.configs import tiny_model

ROOMY = ArkvConfig(budget=128, tiers=("native",))
IDS = torch.arange(1, 13)[None]


def transformed(config: ArkvConfig = ROOMY, arch: str = "llama", **options: Any) -> PreTrainedModel:
    model = models.random_model(arch, **options)
    transform(model, config, compile="eager")
    return model


def small() -> PreTrainedModel:
    """A model of one layer, for tests that need one of their own: compiling takes time."""
    return models.random_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Shared, so that its graphs are compiled once. Whoever changes it changes it back."""
    return transformed()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bugdet": 64}, r"unknown option bugdet; known: .*'budget'"),
        ({"tiers": ("int8", "int5")}, r"unknown format 'int5'; the formats are native, .*int8"),
        ({"score": "snapkv"}, r"unknown score 'snapkv'; the scores are combined, .*paper"),
        ({"score": "mass", "score_options": {"gamma": 1}}, r"'mass' has no option .*gamma.*decay"),
        (
            {"calibration": "papier"},
            r"calibration='papier': choose 'output', 'measured', 'normalised' or 'paper'",
        ),
        ({"preset": "best"}, r"unknown preset 'best'; the presets are .*paper"),
        ({"preset": "paper", "bugdet": 64}, r"unknown option bugdet"),
    ],
)
def test_an_unknown_name_lists_the_known(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownOptionError, match=message):
        ArkvConfig.make(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 35}, r"budget=35: must be at least window \+ sinks = 36"),
        ({"budget": 64, "compression": 2.0}, r"give one of .*not \['compression', 'budget'\]"),
        ({"compression": 0.5}, r"compression=0.5: must be >= 1"),
        ({"compression": float("nan")}, r"compression=nan: must be"),
        ({"context": 0}, "context=0: must be >= 1"),
        ({"bytes": 0}, "bytes=0: must be > 0"),
        ({"window": 0}, "window=0: must be >= 1"),
        ({"sinks": -1}, "sinks=-1: must be >= 0"),
        ({"oq_ratio": 1.5}, "oq_ratio=1.5: must be between 0 and 1"),
        ({"round_to": 0}, "round_to=0: must be >= 1"),
        ({"tiers": ()}, r"tiers=\(\): must be one or two"),
        ({"tiers": ("native", "int8", "int4")}, "tiers=.*: must be one or two"),
        ({"taus": (1.0, 2.0)}, "taus=.*three numbers > 0"),
        ({"taus": (1.0, 2.0, 0.0)}, "taus=.*three numbers > 0"),
        ({"score": "mass", "score_options": {"decay": 1.0}}, r"decay=1.0: must be in \[0, 1\)"),
        ({"score": "paper", "score_options": {"kernel": 4}}, "kernel=4: must be an odd number"),
    ],
)
def test_an_impossible_value_says_what_is_possible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ArkvConfig.make(options)


def test_options_are_kept_through_json() -> None:
    config = ArkvConfig(budget=64, score="mass", score_options={"decay": 0.5}, tiers=("int8",))  # type: ignore[arg-type]
    assert ArkvConfig.make(config.to_dict()) == config
    assert config.replace(bytes=9999).budget is None
    assert preset("paper", budget=99) == ArkvConfig.paper(99)


def test_torch_compile_refuses_unknown_options() -> None:
    def compile(**options: Any) -> Any:
        return torch.compile(lambda x: x + 1, backend=arkv_backend, options=options)(IDS)

    with pytest.raises(BackendCompilerFailed, match="unknown option bugdet; known"):
        compile(bugdet=1)
    with pytest.raises(BackendCompilerFailed, match="compile='fast': choose one of"):
        compile(compile="fast")
    with pytest.raises(UnknownOptionError, match="'default' and 'reduce-overhead'"):
        arkv_backend(torch.fx.symbolic_trace(lambda x: x), [], mode="max-autotune")
    assert torch.equal(compile(compile="eager"), IDS + 1)


def test_an_unknown_lowering_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = small()
    with pytest.raises(UnknownOptionError, match=r"compile='fast': choose one of .*inductor"):
        transform(model, compile="fast")
    assert not hasattr(model, "arkv")
    assert model(IDS).logits.isfinite().all()


def test_bytes_that_do_not_hold_the_ring_hold_it_all_the_same_and_the_report_says_so() -> None:
    model = transformed(ArkvConfig(bytes=4000), num_hidden_layers=1)
    expected = small().generate(IDS, max_new_tokens=24, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=24, do_sample=False), expected)
    report = model.arkv.report()
    (row,) = report.rows
    assert row["slots"] == row["ring"] == 36 == IDS.shape[1] + 24
    assert re.search(
        rf"budget is below.* holds 36 tokens; asked for 4000 bytes, it takes {report.nbytes}\.",
        str(report),
    )
    restore(model)
    transform(model, ArkvConfig(bytes=40_000), compile="eager")  # negative control
    assert "below" not in str(model.arkv.report())


def test_a_head_dim_that_a_format_cannot_store_is_named() -> None:
    model = models.random_model("llama", num_hidden_layers=1, head_dim=12)
    with pytest.raises(UnsupportedFormatError, match=r"'k4v3', values: .* 12 .* multiple of 8"):
        transform(model, ArkvConfig(budget=64, tiers=("int8", "k4v3")), compile="eager")
    assert not hasattr(model, "arkv")
    transform(model, ArkvConfig(budget=64, tiers=("int8",)), compile="eager")


# Calibration


def test_a_calibration_of_another_model_is_refused() -> None:
    import dataclasses

    from arkv_fx.calibration import LayerStatistics, fingerprint

    mine, other = models.random_model("llama"), models.random_model("llama", seed=1)
    row = LayerStatistics(0, 1.0, 1.0, 1.0, 1.0, 0.3)
    calibration = Calibration(fingerprint(other), "paper", (1.0, 1.0, 1.0), (64,), (row,))
    with pytest.raises(CalibrationError, match=r"made for Llama.*run arkv_fx.calibrate on this"):
        transform(mine, ROOMY, calibration)
    assert not hasattr(mine, "arkv")
    for rows, said in (
        ((), "not one layer"),
        ((dataclasses.replace(row, layer=9),), r"layers \[9\]; the model caches 2"),
        ((dataclasses.replace(row, share=float("nan")),), "share nan"),
        ((dataclasses.replace(row, share=1e9),), "sum to 1e"),
        ((dataclasses.replace(row, oq_ratio=5.0),), "oq_ratio 5.0"),
    ):
        with pytest.raises(CalibrationError, match=said):
            transform(other, ROOMY, dataclasses.replace(calibration, layers=rows))
    transform(other, ROOMY, calibration, compile="eager")


# Numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("length", [1, 3])
def test_numbers_that_are_not_finite_are_refused(bad: float, side: str, length: int) -> None:
    plan = LayerPlan(2, 8, 8, torch.float32, 4, 0, 0, (Tier("int8", 4),), "combined")
    state = LayerState(plan, 3, torch.device("cpu"))
    q, k, v = (torch.randn(3, h, length, 8) for h in (4, 2, 2))
    attend(q, k, v, None, state.tensors, plan, Knobs(1.0), False)
    check_finite([(7, state)])
    (k if side == "keys" else v)[1, 0, -1, 3] = bad
    attend(q, k, v, None, state.tensors, plan, Knobs(1.0), False)
    with pytest.raises(NonFiniteError, match=r"layer 7: .*sequence\(s\) \[1\] hold NaN"):
        check_finite([(7, state)])


def test_a_model_that_makes_nan_is_stopped(model: PreTrainedModel) -> None:
    weight = model.get_input_embeddings().weight
    row = weight[100].clone()
    weight[100] = float("nan")
    try:
        cache = ArkvCache(model)
        model(IDS, past_key_values=cache)
        with pytest.raises(NonFiniteError, match=r"layer 0: .*\[0\].*start a new one"):
            model(torch.tensor([[100]]), past_key_values=cache)
    finally:
        weight[100] = row
    with pytest.raises(ArkvError, match="start a new one"):
        model(IDS[:, :1], past_key_values=cache)
    model(IDS, past_key_values=ArkvCache(model))


def test_a_row_of_padding_alone_does_no_harm(model: PreTrainedModel) -> None:
    ids = IDS.expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1] = 0
    cache = ArkvCache(model)
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    alone = model(IDS, past_key_values=ArkvCache(model)).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1], alone, atol=1e-4, rtol=1e-4)
    state = cache.session.layers[0].view()
    assert state.count.tolist() == [12, 0] and not (state.ring.pos[1] >= 0).any()


# Caches of transformed models


def test_a_batch_cannot_change_in_mid_sequence(model: PreTrainedModel) -> None:
    cache = ArkvCache(model)
    model(IDS, past_key_values=cache)
    with pytest.raises(CacheError, match=r"holds 1 sequences, this call has 2.*batch_repeat"):
        model(IDS[:, :1].expand(2, 1), past_key_values=cache)
    model(IDS[:, :1], past_key_values=cache)  # the old batch can still go on
    assert cache.session.layers[1].view().count.tolist() == [13]


def test_sequences_can_be_repeated_and_selected(model: PreTrainedModel) -> None:
    cache = ArkvCache(model)
    assert cache and cache.batch_size == -1
    model(IDS, past_key_values=cache)
    alone = model(IDS[:, :1], past_key_values=cache).logits
    cache.reset()
    model(IDS, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2
    both = model(IDS[:, :1].expand(2, 1), past_key_values=cache).logits
    torch.testing.assert_close(both, alone.expand(2, -1, -1), atol=1e-4, rtol=1e-4)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1
    cache.reset()
    assert cache.batch_size == -1 and cache.get_seq_length() == 0


def test_a_cache_of_another_model_is_refused(model: PreTrainedModel) -> None:
    other = transformed()
    with pytest.raises(CacheError, match=r"belongs to Llama.* not to Llama.*ArkvCache\(model\)"):
        model(IDS, past_key_values=ArkvCache(other))


def test_a_cache_with_a_model_that_is_not_transformed_is_refused(model: PreTrainedModel) -> None:
    plain = models.random_model("llama")
    with pytest.raises(CacheError, match=r"belongs to Llama.*not transformed.*make the cache with"):
        plain(IDS, past_key_values=ArkvCache(model))
    with pytest.raises(CacheError, match="LlamaForCausalLM is not transformed: call arkv_fx"):
        ArkvCache(plain)


def test_a_cache_survives_neither_restore_nor_another_configuration() -> None:
    model = transformed(num_hidden_layers=1)
    cache = ArkvCache(model)
    model(IDS, past_key_values=cache)
    restore(model)
    with pytest.raises(CacheError, match="not transformed"):
        model(IDS[:, :1], past_key_values=cache)
    transform(model, ROOMY.replace(budget=64), compile="eager")
    with pytest.raises(CacheError, match=r"belongs to|another configuration"):
        model(IDS[:, :1], past_key_values=cache)


def filled() -> DynamicCache:
    """A cache of transformers that holds three tokens: an empty one is taken over."""
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), layer)
    return cache


@pytest.mark.parametrize("make", [filled, lambda: ((torch.zeros(1, 2, 3, 16),) * 2,) * 2])
def test_another_cache_is_refused(model: PreTrainedModel, make: Callable[[], Any]) -> None:
    with pytest.raises(CacheError, match=r"got a \w+; pass ArkvCache\(model\).*restore"):
        model(IDS, past_key_values=make())
    with pytest.raises(ArkvError, match=r"got a \w+; pass ArkvCache\(model\).*restore"):
        model.generate(IDS, past_key_values=make(), max_new_tokens=2)


def test_a_static_cache_is_refused_by_name(model: PreTrainedModel) -> None:
    with pytest.raises(CacheError, match=r"cache_implementation='static'.*leave it out"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")


def test_a_cache_cannot_be_cropped(model: PreTrainedModel) -> None:
    cache = ArkvCache(model)
    model(IDS, past_key_values=cache)
    cache.crop(0)
    model(IDS.repeat(1, 20), past_key_values=cache)
    with pytest.raises(CacheError, match=r"cannot be taken back.*past_recording.*deepcopy"):
        cache.crop(-3)


def test_a_freed_cache_is_said_to_be_freed(model: PreTrainedModel) -> None:
    from arkv_fx.state.session import Session, find_session

    session = Session()
    handle = session.handle
    assert find_session(handle) is session
    del session
    gc.collect()
    with pytest.raises(CacheError, match="freed; keep a reference"):
        find_session(handle)


def test_a_cache_is_copied_deeply_or_not_at_all(model: PreTrainedModel) -> None:
    """A shallow copy would share its tensors but not its length."""
    cache = ArkvCache(model)
    for shallow in (copy.copy, pickle.dumps):
        with pytest.raises(CacheError, match=r"copy\.deepcopy"):
            shallow(cache)


def test_an_interrupted_step_spoils_the_cache(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers have the new token then, and some do not."""
    cache = ArkvCache(model)
    model(IDS, past_key_values=cache)

    def interrupt(layers: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(backend, "check_finite", interrupt)
        model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(CacheError, match=r"interrupted|start a new"):
        model(IDS[:, :1], past_key_values=cache)


def test_beam_search_equals_the_full_cache(model: PreTrainedModel) -> None:
    options = {"num_beams": 2, "max_new_tokens": 12, "do_sample": False, "output_scores": True,
               "return_dict_in_generate": True, "num_return_sequences": 2}  # fmt: skip
    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = models.random_model("llama").generate(ids, attention_mask=mask, **options)
    out = model.generate(ids, attention_mask=mask, **options)
    assert not torch.equal(expected.beam_indices % 2, expected.beam_indices[:, :1] % 2), (
        "no reorder"
    )
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.sequences_scores, expected.sequences_scores)


def test_beam_search_without_reordering_is_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above."""
    monkeypatch.setattr(ArkvCache, "_select", lambda *_: None)
    with pytest.raises(AssertionError):
        test_beam_search_equals_the_full_cache(model)


def test_the_cache_may_be_left_out(model: PreTrainedModel) -> None:
    """Scoring without a cache is the plain model."""
    out = model(IDS, use_cache=False)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits, models.random_model("llama")(IDS).logits)


def test_inference_mode_and_no_grad_mix(model: PreTrainedModel) -> None:
    cache = ArkvCache(model)
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
        copied = copy.deepcopy(cache)
        cache.batch_select_indices(torch.tensor([0]))
    again = ArkvCache(model)
    model(IDS, past_key_values=again)
    expected = model(IDS[:, :1], past_key_values=again).logits
    for other in (cache, copied):
        torch.testing.assert_close(model(IDS[:, :1], past_key_values=other).logits, expected)


def test_a_model_that_runs_without_its_graphs_is_noticed() -> None:
    """Dynamo gives up silently: what it leaves running keeps everything in full precision."""
    model = transformed(num_hidden_layers=1)
    with torch.compiler.set_stance("force_eager"), pytest.raises(CacheError, match="compil"):
        model(IDS)


# transform and restore


def test_transform_and_restore_are_strict() -> None:
    model = small()
    with pytest.raises(TransformError, match="LlamaForCausalLM is not transformed"):
        restore(model)
    transform(model, ROOMY, compile="eager")
    with pytest.raises(TransformError, match=r"transformed already: call arkv_fx.restore"):
        transform(model, ROOMY)
    with pytest.raises(TransformError, match=r"takes an nn.Module, not a str"):
        transform("llama")  # type: ignore[arg-type]
    assert restore(model) is model
    with pytest.raises(TransformError, match="nothing to restore"):
        restore(model)


def test_an_encoder_decoder_answers_as_before() -> None:
    """Its self-attention is compressed, its cross-attention keeps the encoder's keys."""
    config = BartConfig(
        vocab_size=128, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    transform(model, ROOMY, compile="eager")
    out = model.generate(
        IDS, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )  # fmt: skip
    assert torch.equal(out.sequences, expected)
    assert list(out.past_key_values.self_attention_cache.session.layers) == [0]
    rows = {row["path"]: row["fused"] for row in model.arkv.report().rows}
    assert rows == {
        "model.decoder.layers.0.self_attn": True,
        "model.decoder.layers.0.encoder_attn": False,
    }
    with pytest.raises(CacheError, match="got a EncoderDecoderCache"):
        model(IDS, past_key_values=EncoderDecoderCache(filled(), DynamicCache()))


def test_a_copy_of_a_transformed_model_is_refused(model: PreTrainedModel) -> None:
    """It would go on computing with the original's weights."""
    with pytest.raises(TransformError, match=r"restore"):
        copy.deepcopy(model)


def test_torch_compile_around_a_transformed_model_is_harmless(model: PreTrainedModel) -> None:
    out = torch.compile(model, backend="eager")(IDS)
    torch.testing.assert_close(out.logits, model(IDS).logits)
    assert type(out.past_key_values) is ArkvCache


def test_a_model_with_attention_of_its_own_is_right_and_says_so() -> None:
    """Nothing is compressed: the report must not be silent about it."""
    model = tiny_model("doge")  # its mask is computed from the cached values
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    transform(model, ROOMY, compile="eager")
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
    report = model.arkv.report()
    assert report.fused == 0 and len(report.rows) == 2
    assert all("what the cache returns is also read by" in row["reason"] for row in report.rows)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_implementations_of_attention_are_compressed_too(implementation: str) -> None:
    expected = small().generate(IDS, max_new_tokens=4, do_sample=False)
    model = transformed(num_hidden_layers=1, attn_implementation=implementation)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
    assert model.arkv.report().fused == 1
    assert model.config._attn_implementation == implementation


def test_restore_gives_back_the_same_bytes() -> None:
    model = small()
    keys = set(model.__dict__)
    before = model(IDS)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    answer = model.generate(IDS, max_new_tokens=5, do_sample=False)
    transform(model, ArkvConfig(budget=36, window=8, sinks=0, tiers=("int4",)), compile="eager")
    model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert model.arkv.report().fused == 1
    restore(model)
    assert set(model.__dict__) == keys
    after = model(IDS)
    assert torch.equal(before.logits, after.logits)
    assert type(after.past_key_values) is DynamicCache
    assert torch.equal(after.past_key_values.layers[0].keys, before.past_key_values.layers[0].keys)
    assert torch.equal(answer, model.generate(IDS, max_new_tokens=5, do_sample=False))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_restore_gives_back_a_forward_of_the_instance() -> None:
    """accelerate's hooks put theirs there."""
    model = small()
    own, calls = model.forward, []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = hooked
    transform(model, ROOMY, compile="eager")
    restore(model)
    assert model.forward is hooked
    model(IDS)
    assert calls


@torch.enable_grad()
def test_training_with_a_cache_is_refused(model: PreTrainedModel) -> None:
    model.train()
    try:
        with pytest.raises(CacheError, match=r"not differentiated: use .*no_grad.*model.eval\(\)"):
            model(IDS, past_key_values=ArkvCache(model))
    finally:
        model.eval()


@torch.enable_grad()
def test_training_without_a_cache_gives_the_same_gradients() -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        model.train()
        out = model(IDS, labels=IDS)
        model.zero_grad()
        out.loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    model = small()
    expected = gradients(model)
    transform(model, ROOMY, compile="eager")
    for a, b in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@torch.enable_grad()
def test_torch_compile_keeps_gradients_too() -> None:
    model = small()
    model(IDS, labels=IDS).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    backend = ArkvBackend(ROOMY, compile="eager")
    torch.compile(model, backend=backend)(IDS, labels=IDS).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)
    assert all("gradients are wanted" in s.reason for sites in backend.sites for s in sites)


# A transformers cache that torch.compile(backend="arkv") has emptied


@pytest.fixture(scope="module")
def compiled() -> tuple[PreTrainedModel, Any]:
    model = models.random_model("llama")
    return model, torch.compile(model, backend=ArkvBackend(ROOMY, compile="eager"))


def _crop(cache: DynamicCache, _: PreTrainedModel) -> DynamicCache:
    cache.crop(-2)
    return cache


def _reorder(cache: DynamicCache, _: PreTrainedModel) -> DynamicCache:
    cache.reorder_cache(torch.tensor([0]))
    return cache


def _copy(cache: DynamicCache, _: PreTrainedModel) -> DynamicCache:
    return copy.deepcopy(cache)


def _foreign(_: DynamicCache, model: PreTrainedModel) -> DynamicCache:
    cache: DynamicCache = model(IDS, use_cache=True).past_key_values
    return cache


def _shift(cache: DynamicCache, _: PreTrainedModel) -> DynamicCache:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
    return cache


def _mix(cache: DynamicCache, _: PreTrainedModel) -> DynamicCache:
    for layer, other in zip(cache.layers, reversed(copy.copy(cache.layers)), strict=True):
        layer.keys = other.keys.clone() if layer is cache.layers[1] else layer.keys
    return cache


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_crop, "10 tokens where 12 were returned: it was cropped.*restore"),
        (_shift, "11 tokens where 12 were returned"),
        (_reorder, "not returned by this compiled model.*use arkv_fx.transform with an ArkvCache"),
        (_copy, "not returned by this compiled model"),
        (_foreign, "not returned by this compiled model"),
        (_mix, "not returned by this compiled model|of different sequences"),
    ],
)
def test_an_absorbed_cache_that_was_touched_is_refused(
    compiled: tuple[PreTrainedModel, Any],
    damage: Callable[[DynamicCache, PreTrainedModel], DynamicCache],
    message: str,
) -> None:
    model, call = compiled
    cache = DynamicCache(config=model.config)
    call(IDS, past_key_values=cache)
    with pytest.raises(AbsorbedCacheError, match=message):
        call(IDS[:, :1], past_key_values=damage(cache, model))


def test_an_absorbed_cache_cannot_be_continued_twice(compiled: tuple[PreTrainedModel, Any]) -> None:
    """The second continuation would see the first one's tokens."""
    model, call = compiled
    cache = DynamicCache(config=model.config)
    call(IDS, past_key_values=cache)
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    call(IDS[:, :1], past_key_values=cache)
    with pytest.raises(AbsorbedCacheError, match="12 tokens where 13 were returned"):
        call(IDS[:, :1], past_key_values=twin)


def test_an_absorbed_cache_grows_no_batch(compiled: tuple[PreTrainedModel, Any]) -> None:
    model, call = compiled
    cache = DynamicCache(config=model.config)
    call(IDS, past_key_values=cache)
    for layer in cache.layers:
        layer.keys, layer.values = (
            layer.keys.expand(2, -1, -1, -1),
            layer.values.expand(2, -1, -1, -1),
        )
    with pytest.raises(AbsorbedCacheError, match="batch or configuration changed"):
        call(IDS[:, :1].expand(2, 1), past_key_values=cache)


def test_an_absorbed_cache_read_by_the_plain_model_is_not_taken_for_numbers(
    compiled: tuple[PreTrainedModel, Any],
) -> None:
    model, call = compiled
    cache = DynamicCache(config=model.config)
    call(IDS, past_key_values=cache)
    assert model(IDS[:, :1], past_key_values=cache).logits.isnan().all()


def test_all_errors_are_ours() -> None:
    named = [getattr(arkv_fx.errors, name) for name in dir(arkv_fx.errors) if "Error" in name]
    assert all(issubclass(error, ArkvError) for error in named)


def test_two_names_for_one_cache_are_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers since 5.24 takes them, one by one."""
    monkeypatch.setattr(model.arkv, "cache_names", ("past_key_values", "cache"))
    both = {"past_key_values": ArkvCache(model), "cache": ArkvCache(model)}
    with pytest.raises(CacheError, match="are one argument, and differ"):
        model(IDS, **both)
    cache = both["cache"]
    model(IDS, past_key_values=None, cache=cache)
    assert cache.get_seq_length() == IDS.shape[1]
