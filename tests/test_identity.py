"""With room for everything the small cache changes nothing: real models, real `generate()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from arkv_fx import ArkvCache, ArkvConfig, models, transform
from arkv_fx.compile.backend import ArkvBackend

PROMPT, STEPS = 40, 40
ROOMY = ArkvConfig(budget=128, tiers=("native",))
TOLERANCE = 1e-4
ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2", "qwen3_moe")


@pytest.fixture(autouse=True)
def no_graphs_of_the_last_test() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@dataclass(frozen=True)
class Answer:
    """Greedy tokens [B, STEPS] and the logits they were taken from [B, STEPS, vocabulary]."""

    tokens: Tensor
    logits: Tensor


def prompts() -> dict[str, tuple[Tensor, Tensor]]:
    """(ids, mask) of a single prompt and of a left-padded batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 128, (3, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :25] = 0, 0
    return {"single": (ids[:1], mask[:1]), "padded": (ids * mask, mask)}


@torch.no_grad()
def loop(
    call: Callable[..., Any],
    ids: Tensor,
    mask: Tensor,
    cache: Any,
    at_half: Callable[[Any], None] = lambda _: None,
) -> Answer:
    """Greedy decoding by hand, with positions counted from the first real token."""
    tokens, logits = [], []
    new = ids
    for step in range(STEPS):
        if step == STEPS // 2:
            at_half(cache)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        last = call(
            input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits[:, -1]
        new = last.argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(new)], -1)
        tokens.append(new)
        logits.append(last)
    return Answer(torch.cat(tokens, -1), torch.stack(logits, 1))


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> Answer:
    """The same by `generate()`."""
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return Answer(out.sequences[:, PROMPT:], torch.stack(out.logits, 1))


def random_model(arch: str) -> PreTrainedModel:
    # With tied embeddings, gemma3 only repeats the last token, whatever its attention says.
    return models.random_model(arch, tie_word_embeddings=False)


@lru_cache
def reference(arch: str, batch: str) -> Answer:
    """The untransformed model with transformers' own cache."""
    model = random_model(arch)
    ids, mask = prompts()[batch]
    answer = loop(model, ids, mask, DynamicCache(config=model.config))
    assert len(answer.tokens.unique()) > 5, "a model that repeats itself tests nothing"
    return answer


def compare(answer: Answer, expected: Answer) -> None:
    difference = (answer.logits - expected.logits).abs().max() / expected.logits.abs().max()
    assert difference <= TOLERANCE, f"logits differ by {difference:.1e}"
    assert torch.equal(answer.tokens, expected.tokens), "other tokens"


def test_generate_and_the_loop_are_the_same_reference() -> None:
    for batch, (ids, mask) in prompts().items():
        compare(generate(random_model("llama"), ids, mask), reference("llama", batch))


def transformed(arch: str, lowering: str) -> PreTrainedModel:
    model = random_model(arch)
    transform(model, ROOMY, compile=lowering)
    return model


def cases(*quick: tuple[str, str]) -> list[Any]:
    """All (architecture, batch, lowering); with graphs run as they are, some are not slow."""
    return [
        pytest.param(
            arch, batch, lowering,
            marks=[] if lowering == "eager" and (arch, batch) in quick else pytest.mark.slow,
        )
        for lowering in ("eager", "inductor")
        for arch in ARCHITECTURES
        for batch in ("single", "padded")
    ]  # fmt: skip


ALL_PADDED = [(arch, "padded") for arch in ARCHITECTURES]


@pytest.mark.parametrize(
    ("arch", "batch", "lowering"), cases(*ALL_PADDED, ("llama", "single"), ("gemma3", "single"))
)
def test_a_transformed_model_answers_as_before(arch: str, batch: str, lowering: str) -> None:
    model = transformed(arch, lowering)
    ids, mask = prompts()[batch]
    compare(generate(model, ids, mask), reference(arch, batch))
    cache = ArkvCache(model)
    compare(generate(model, ids, mask, past_key_values=cache), reference(arch, batch))
    assert cache.get_seq_length() == PROMPT + STEPS - 1
    assert not cache.session.plain, "a layer kept everything in full precision"
    assert model.arkv.report().fused == 2, "the small cache was not used at all"


@pytest.mark.parametrize(
    ("arch", "batch", "lowering"),
    cases(("llama", "single"), ("llama", "padded"), ("gemma3", "padded"), ("gpt2", "padded")),
)
def test_torch_compile_of_an_unmodified_model_answers_as_before(
    arch: str, batch: str, lowering: str
) -> None:
    model = random_model(arch)
    backend = ArkvBackend(ROOMY, compile=lowering)
    cache = DynamicCache(config=model.config)
    answer = loop(torch.compile(model, backend=backend), *prompts()[batch], cache)
    compare(answer, reference(arch, batch))
    assert all(site.fused for sites in backend.sites for site in sites)


@pytest.mark.skipif("arkv" not in torch._dynamo.list_backends(None), reason="needs an installation")
def test_torch_compile_by_name() -> None:
    model = random_model("llama")
    options = {"budget": 128, "tiers": ["native"], "compile": "eager"}
    compiled = torch.compile(model, backend="arkv", options=options)
    ids, mask = prompts()["single"]
    cache = DynamicCache(config=model.config)
    compare(loop(compiled, ids, mask, cache), reference("llama", "single"))
    held = cache.layers[0].keys
    assert held.shape[-2] == PROMPT + STEPS - 1
    assert held.untyped_storage().nbytes() == held.dtype.itemsize, "the cache takes memory"


def test_a_lost_token_or_a_wrong_value_is_noticed() -> None:
    """Negative controls: half way, in one layer, one position less or one value doubled."""
    model = transformed("llama", "eager")
    ids, mask = prompts()["single"]
    expected = reference("llama", "single")

    def drop(cache: ArkvCache) -> None:
        cache.session.layers[0].view().ring.pos[:, :, 1] = -1

    def scale(cache: ArkvCache) -> None:
        cache.session.layers[1].view().tiers[0].v[0][:, 0, 3] *= 2

    compare(loop(model, ids, mask, ArkvCache(model)), expected)
    for damage in (drop, scale):
        with pytest.raises(AssertionError, match="logits differ"):
            compare(loop(model, ids, mask, ArkvCache(model), damage), expected)


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["single", "padded"])
def test_lowerings_agree_while_evicting(batch: str) -> None:
    """Kernels and generated code quantize, rank and evict as the reference, token by token."""
    config = ArkvConfig(budget=28, window=4, sinks=2)
    ids, mask = prompts()[batch]
    answers, held = [], []
    for compile in ("reference", "eager", "inductor"):
        model = models.random_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
        transform(model, config, compile=compile)
        cache = ArkvCache(model)
        answers.append(loop(model, ids, mask, cache))
        held.append([s.pos.sort(-1).values for s in cache.session.layers[0].view().segments])
    for answer, tokens in zip(answers[1:], held[1:], strict=True):
        compare(answer, answers[0])
        pairs = zip(tokens, held[0], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "other tokens are held"
    full = models.random_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    with pytest.raises(AssertionError):  # else nothing was evicted
        compare(answers[0], loop(full, ids, mask, DynamicCache(config=full.config)))
