"""The command line: what it prints and writes, and that errors are one line and exit code 1."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

import arkv_fx
from arkv_fx import ArkvConfig, Calibration, models, transform
from arkv_fx.cli import app
from arkv_fx.commands import calibrate_report, common, doctor
from arkv_fx.commands.group import COMMANDS, Entry
from arkv_fx.commands.group import load as load_command
from arkv_fx.models import load
from arkv_fx.zoo.configs import tiny_config

PROMPT = "It is a truth universally acknowledged, that a single man in possession of a good "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT * 4)
    return str(path)


def run(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_generate_prints_the_text_and_writes_the_measurements(
    model: str, prompt: str, tmp_path: Path
) -> None:
    out = tmp_path / "g.json"
    result = run(
        "generate", "--model", model, "--prompt-file", prompt, "--max-new-tokens", "6",
        "--compression", "2", "--json", out,
    )  # fmt: skip
    row = json.loads(out.read_text())
    assert row["prompt_tokens"] == len(PROMPT) * 4
    assert row["new_tokens"] == 6
    assert row["full_bytes"] == 2 * (len(PROMPT) * 4 + 5) * 2 * 32 * 4
    assert row["bytes"] <= row["full_bytes"] / 1.9
    assert row["decode_tokens_per_second"] > 0 and row["compile"] == "eager"
    assert row["first_token_seconds"] > row["prompt_tokens"] / row["prefill_tokens_per_second"]
    assert row["text"].strip() in result.stdout
    assert "start-up included" in result.stderr and "tokens/s with tracing" in result.stderr
    assert row["compression"] == row["full_bytes"] / row["bytes"]
    assert row["full_bytes_16bit"] == row["full_bytes"] / 2 and not row["notes"]
    ratio = f"({row['compression_16bit']:.2f}x)"
    said = " ".join(result.stderr.split())
    assert "a full float32 cache takes" in said and "a full 16-bit cache takes" in said
    assert ratio in said


def test_generate_with_quantized_weights(model: str, prompt: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    out = tmp_path / "g.json"
    args = ["generate", "--model", model, "--prompt-file", prompt, "--max-new-tokens", "2"]
    run(*args, "--weights", "int4", "--json", out)
    row = json.loads(out.read_text())
    assert row["weights"] == "int4" and row["new_tokens"] == 2
    assert any("14 int4, 1 int8; the originals are not kept" in note for note in row["notes"])


def test_generate_with_a_budget_and_a_preset(model: str, prompt: str, tmp_path: Path) -> None:
    out = tmp_path / "g.json"
    args = ["generate", "--model", model, "--prompt-file", prompt, "--max-new-tokens", "2"]
    run(*args, "--preset", "paper", "--budget", "64", "--json", out)
    assert json.loads(out.read_text())["bytes"] < 2 * 2 * 64 * (2 * 16 * 4 + 16)


def test_calibrate_then_report(model: str, tmp_path: Path) -> None:
    out, picture = tmp_path / "c.json", tmp_path / "c.png"
    pytest.importorskip("matplotlib")
    result = run(
        "calibrate", "--model", model, "--text", "esther", "--context", "2000", "--out", out,
        "--plot", picture, "--json",
    )  # fmt: skip
    calibration = Calibration.load(out)
    assert json.loads(result.stdout)["fingerprint"] == calibration.fingerprint
    assert picture.stat().st_size > 1000
    found = json.loads(
        run("report", model, "--calibration", out, "--context", "1024", "--json").stdout
    )
    assert [site["fused"] for site in found["sites"]] == [True, True]
    assert found["bytes"] <= found["full_bytes"] / 4


def test_eval_fidelity(model: str, tmp_path: Path) -> None:
    out = tmp_path / "f.json"
    result = run(
        "eval", "fidelity", "--model", model, "--text", "esther", "--context", "300", "--steps",
        "2", "--compression", "2", "--method", "full", "--method", "default:window=8",
        "--json", out,
    )  # fmt: skip
    rows = json.loads(out.read_text())
    assert [row["method"] for row in rows] == ["full", "default:window=8"]
    assert {row["text"] for row in rows} == {"esther"}
    assert "kl_mean" in result.stdout


def test_eval_passkey(model: str, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    run(
        "eval", "passkey", "--model", model, "--context", "300", "--method", "full", "--prompts",
        "1", "--filler", "prose", "--json", out,
    )  # fmt: skip
    assert [row["total"] for row in json.loads(out.read_text())] == [1, 1]


def test_export_then_generate_by_onnx_runtime(model: str, prompt: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "engine", tmp_path / "g.json"
    result = run("export", model, "--out", folder, "--budget", "64")
    assert "decode.onnx" in result.stdout
    engine = ["generate", "--engine", folder, "--prompt-file", prompt]
    result = run(*engine, "--max-new-tokens", "6", "--json", out)
    row = json.loads(out.read_text())
    assert (row["prompt_tokens"], row["new_tokens"]) == (len(PROMPT) * 4, 6)
    assert row["text"].strip() in result.stdout
    assert row["bytes"] == json.loads((folder / "arkv.json").read_text())["state_bytes"]
    fails(*engine, "--budget", "64", says="--budget: an engine has the cache")
    fails("export", model, "--out", folder, says="not an empty folder")
    fails("generate", "--engine", tmp_path, "--prompt-file", prompt, says="no arkv.json")


def test_export_refuses_what_it_cannot_write(model: str, tmp_path: Path) -> None:
    command = ["export", model, "--out", tmp_path / "e"]
    fails(*command, "--target", "tflite", says="unknown target 'tflite'")
    fails(*command, "--preset", "paper", says="which is not exported")
    assert not list(tmp_path.iterdir())


def test_report_as_text(model: str) -> None:
    assert "2 of 2 attention sites fused" in run("report", model, "--budget", "64").stdout


def test_report_needs_no_weights(tmp_path: Path) -> None:
    """Of a layer of Llama-3-70B: 4096 tokens of 8 heads' keys and values, 128 numbers of bf16."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        num_hidden_layers=2, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = json.loads(run("report", tmp_path, "--compression", "4", "--json").stdout)
    assert [site["fused"] for site in found["sites"]] == [True, True]
    assert found["full_bytes"] == 2 * 4096 * 8 * 128 * 2 * 2
    assert 0.2 < found["bytes"] / found["full_bytes"] <= 0.25
    whole = json.loads(run("report", tmp_path, "--dtype", "float32", "--json").stdout)
    assert whole["full_bytes"] == 2 * found["full_bytes"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("t5:seq2seq", "2 of 6 attention sites fused"),
        ("llava:multimodal", "2 of 2 attention sites fused"),
        ("deepseek_v32", "chooses tokens with an indexer"),
        ("mamba", "0 of 0"),
    ],
)
def test_report_of_other_kinds(name: str, said: str, tmp_path: Path) -> None:
    tiny_config(name).save_pretrained(tmp_path)
    assert said in run("report", tmp_path, "--budget", "64").stdout


def test_report_says_what_a_model_with_weights_says(model: str) -> None:
    network, _ = load(model)
    transform(network, ArkvConfig(budget=64), compile="eager")
    shown = run("report", model, "--budget", "64", "--dtype", "float32").stdout
    assert shown.strip() == str(network.arkv.report())


def test_doctor() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["packages"]["torch"] and found["devices"]
    assert "C++ compiler" in run("doctor").stdout


@pytest.mark.parametrize("tensorrt", ["1.7", None])
def test_doctor_reads_the_extras_that_the_package_declares(
    tensorrt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the metadata of a wheel; only tensorrt-rtx comes and goes."""
    declared = [
        "torch<2.14,>=2.11",
        "rich; python_version >= '3.11'",
        'onnx; extra == "export"',
        'arkv-fx[export]; extra == "tensorrt"',
        'tensorrt-rtx; extra == "tensorrt"',
        'colorama; sys_platform == "nowhere" and extra == "plot"',
        'matplotlib; extra == "plot"',
    ]
    versions = {"torch": "2.13.0", "rich": "15.0.0", "onnx": "1.23.2", "tensorrt-rtx": tensorrt}
    extras = ["export", "tensorrt", "plot"]
    monkeypatch.setattr(doctor, "_declared", lambda: (declared, extras))
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = json.loads(run("doctor", "--json").stdout)
    missing = [] if tensorrt else ["tensorrt-rtx"]
    assert found["missing"] == {"export": [], "tensorrt": missing, "plot": ["matplotlib"]}
    assert list(found["packages"])[:5] == ["torch", "rich", "onnx", "tensorrt-rtx", "matplotlib"]
    monkeypatch.setenv("COLUMNS", "200")
    rows = [re.findall(r"[\w-]+", line) for line in run("doctor").stdout.splitlines()]
    assert ["tensorrt", "no" if missing else "yes", *missing] in rows


def test_doctor_of_what_is_installed() -> None:
    """Every extra of the project is known, none of another name."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    found = doctor.examine()
    assert set(found["missing"]) == set(project["project"]["optional-dependencies"])
    assert found["arkv_fx"] == arkv_fx.__version__


def test_commands_are_listed() -> None:
    shown = run("--help").stdout
    assert all(
        name in shown for name in ("generate", "calibrate", "report", "eval", "export", "doctor")
    )


def check_help(entries: Mapping[str, Entry]) -> None:
    """The list of commands says what each command says of itself first."""
    for name, entry in entries.items():
        assert entry.help == load_command(name).help.partition("\n")[0]


def test_the_list_says_what_the_commands_say() -> None:
    check_help(COMMANDS)
    shown = " ".join(re.sub(r"[^\x00-\x7f]", " ", run("--help").stdout).split())
    assert all(f"{name} {entry.help}" in shown for name, entry in COMMANDS.items())
    with pytest.raises(AssertionError):  # negative control
        check_help({"zoo": COMMANDS["bench"]})


def test_a_command_has_its_own_help() -> None:
    assert "--max-new-tokens" in run("generate", "--help").stdout
    assert "passkey" in run("eval", "--help").stdout
    assert "--filler" in run("eval", "passkey", "--help").stdout


def fails(*args: str, says: str) -> None:
    result = run(*args, code=1)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0] and result.stderr.strip().endswith(lines[0])


def test_errors_are_one_line(model: str, prompt: str, tmp_path: Path) -> None:
    with_model = ["generate", "--model", model, "--prompt-file"]
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    fails(*with_model, tmp_path / "none.txt", says="cannot be read as text")
    fails(*with_model, binary, says="cannot be read as text")
    fails(*with_model, empty, says="has 0 tokens")
    fails(*with_model, prompt, "--chat", says="no chat template")
    fails(*with_model, prompt, "--device", "nowhere", says="device 'nowhere'")
    fails(*with_model, prompt, "--preset", "best", says="unknown preset")
    fails(*with_model, prompt, "--budget", "8", "--compression", "2", says="not both")
    fails(*with_model, prompt, "--calibration", prompt, says="as a calibration")
    fails("report", str(tmp_path), says="cannot load the model")
    evaluate = ["eval", "fidelity", "--model", model]
    fails(*evaluate, "--text", "hamlet", says="unknown text")
    fails(*evaluate, "--context", "90000", says="tokens; context + steps")
    fails(*evaluate, "--method", "best", says="unknown method")
    fails("eval", "passkey", "--model", model, "--filler", "noise", says="choose one of")


def changed(folder: Path, arch: str = "llama", **changes: Any) -> str:
    """A model whose config.json says something else."""
    path = tiny_model.save(folder, arch) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"intermediate_size": 96}, "cannot load the model"),
        ({"hidden_size": "many"}, "cannot load the model"),
        ({"num_attention_heads": 0}, "cannot load the model"),
        ({"vocab_size": -1}, "cannot load the model"),
        (
            {"num_hidden_layers": 3, "layer_types": None},
            "lacks 9 weights of 30 that its config.json asks for, the first of them model.layers.2",
        ),
    ],
)
def test_a_configuration_of_another_checkpoint_is_one_line(
    changes: dict[str, Any], says: str, prompt: str, tmp_path: Path
) -> None:
    folder = changed(tmp_path / "model", **changes)
    fails("generate", "--model", folder, "--prompt-file", prompt, says=says)


def test_other_mistakes_are_one_line(model: str, prompt: str, tmp_path: Path) -> None:
    with_model = ["generate", "--model", model, "--prompt-file", prompt]
    fails(*with_model, "--device", "meta", says="'meta' is not to be had")
    fails(*with_model, "--budget", "1000000000", says="GiB of memory: lower --budget")
    fails(*with_model, "--context", "3000000000", says="context=3000000000: must be")
    fails(*with_model, "--budget", "20", says="at least window + sinks = 36")
    gpt = str(tiny_model.save(tmp_path / "gpt2", "gpt2"))
    says = "the model has positions for 512: give a shorter prompt or a smaller --max-new-tokens"
    fails("generate", "--model", gpt, "--prompt-file", prompt, "--max-new-tokens", 400, says=says)
    (Path(gpt) / "tokenizer.json").write_text("[]")
    fails("generate", "--model", gpt, "--prompt-file", prompt, says="cannot load the model")


def test_where_results_go_is_looked_at_first(
    model: str, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded first"))
    nowhere = tmp_path / "none" / "x"
    with_model = ["generate", "--model", model, "--prompt-file", prompt]
    fails(*with_model, "--json", nowhere, says="cannot be written")
    fails(*with_model, "--json", tmp_path, says="it is a folder")
    for option in ("--out", "--plot"):
        fails("calibrate", "--model", model, option, nowhere, says="cannot be written")
    fails("eval", "fidelity", "--model", model, "--json", nowhere, says="cannot be written")
    fails("export", model, "--out", prompt, says="not an empty folder")
    fails("export", model, "--out", Path(prompt) / "x", says="cannot be made")


def test_the_text_is_printed_before_a_file_is_written(
    model: str, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(common, "write_text", full)
    args = ["--max-new-tokens", "2", "--compile", "eager", "--json", tmp_path / "g.json"]
    result = run("generate", "--model", model, "--prompt-file", prompt, *args, code=1)
    assert "tokens/s" in result.stderr and "no space left" in result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("text", ["x", "A cat sat."])
def test_a_short_prompt_needs_no_compression(model: str, tmp_path: Path, text: str) -> None:
    path, out = tmp_path / "prompt.txt", tmp_path / "g.json"
    path.write_text(text)
    args = ["generate", "--model", model, "--prompt-file", path, "--max-new-tokens", "20"]
    result = run(*args, "--json", out)
    network, tokenizer = load(model)
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = network.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    row = json.loads(out.read_text())
    assert row["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert "holds 36 tokens" in row["notes"][0] and "note: the budget is below" in result.stderr


def test_what_was_not_foreseen_is_one_line_with_its_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(models, "skeleton", broken)
    monkeypatch.setattr(calibrate_report, "skeleton", broken)
    fails("report", str(tmp_path), says="ZeroDivisionError: by zero (not foreseen; with ARKV_LOG")


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    folder = tiny_model.save(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails("calibrate", "--model", str(folder), says="")


@pytest.mark.parametrize("args", [["generate", "--bogus"], ["bogus"], ["eval", "fidelity", "x"]])
def test_unknown_options_are_refused(args: list[str]) -> None:
    run(*args, code=2)
