"""``arkv generate``: text from a model with a small cache, and what it took."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from arkv_fx.commands.common import (
    Budget,
    CalibrationFile,
    Compression,
    Context,
    Device,
    DType,
    DTypeOption,
    JsonFile,
    Lowering,
    Model,
    Preset,
    Weights,
    read_text,
    write_json,
)
from arkv_fx.commands.console import err
from arkv_fx.commands.prepared import encode, prepare
from arkv_fx.commands.run_engine import (
    Runtime,
    load_tokenizer,
    open_engine,
    refuse_with_engine,
)
from arkv_fx.commands.streamed import Streamed
from arkv_fx.compile.uncompiled import UNCOMPILED
from arkv_fx.errors import EvaluationError
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.report import against_full


def generate(
    ctx: typer.Context,
    prompt_file: Annotated[Path, typer.Option(help="The prompt, a UTF-8 file.")],
    model: Model = "smollm2",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    compression: Compression = None,
    context: Context = None,
    budget: Budget = None,
    preset: Preset = "default",
    calibration: CalibrationFile = None,
    compile: Annotated[
        Lowering | None, typer.Option(help="Default: eager for short texts on a CPU, else inductor")
    ] = None,
    dtype: DTypeOption = DType.float32,
    device: Device = "cpu",
    weights: Annotated[
        Weights | None,
        typer.Option(help="Quantize the linear layers' weights with torchao, arkv-fx[weights]."),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the chat template.")] = False,
    engine: Annotated[
        Path | None,
        typer.Option(
            help="A folder of `arkv export`, run in place of --model; sizes and formats are those "
            "it was exported with."
        ),
    ] = None,
    runtime: Annotated[
        Runtime | None,
        typer.Option(
            help="What runs --engine. Default: tensorrt if it holds engines for this GPU, else onnx"
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Continue a prompt, greedily; --context is prompt and new tokens unless given."""
    text = read_text(prompt_file)
    if engine is not None:
        refuse_with_engine(ctx)
        _run_engine(engine, runtime, text, max_new_tokens, chat, json)
        return
    if runtime is not None:
        raise EvaluationError(f"--runtime {runtime}: it says what runs --engine, and there is none")
    network, tokenizer, ids, lowering = prepare(
        text, max_new_tokens, model=model, compression=compression, context=context, budget=budget,
        preset=preset, calibration=calibration, compile=compile, dtype=dtype, device=device,
        chat=chat, weights=None if weights is None else str(weights),
    )  # fmt: skip
    with err.status("compile") as status:
        streamed = Streamed(tokenizer, status.stop)
        if lowering not in UNCOMPILED:
            _run(network, ids[:, :64], 4)  # so that the run itself is timed without compilation
        status.update("read the prompt")
        cache, new = _run(network, ids, max_new_tokens, streamed)
    row = {
        "model": model,
        "dtype": str(dtype),
        "weights": None if weights is None else str(weights),
        "compile": str(lowering),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        **streamed.rates(ids.shape[1]),
        **sizes_of(cache),
        "notes": list(network.arkv.report().notes),  # type: ignore[union-attr,operator]
        "text": str(tokenizer.decode(new, skip_special_tokens=True)),
    }
    _show(row, json)


def _run_engine(
    folder: Path, runtime: Runtime | None, text: str, tokens: int, chat: bool, json: Path | None
) -> None:
    """The same from an exported folder."""
    session, name, notes = open_engine(folder, runtime)
    tokenizer = load_tokenizer(folder, session.sidecar.content.get("tokenizer"))
    ids = encode(tokenizer, text, chat)
    if session.batch != 1:
        raise EvaluationError(f"{folder}: its graphs take {session.batch} prompts at once, not one")
    new: list[int] = []
    with err.status("read the prompt") as status:
        streamed = Streamed(tokenizer, status.stop)
        streamed.put(ids)
        for token in session.stream(ids.numpy(), tokens):
            new.append(int(token[0]))
            streamed.put(torch.tensor([token[0]]))
        streamed.end()  # type: ignore[no-untyped-call]
    stop = new[-1:] if new[-1] in session.sidecar.eos else []
    row = {
        "engine": str(folder),
        "runtime": name,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        **streamed.rates(ids.shape[1]),
        "bytes": session.nbytes,
        "notes": notes,
        "text": str(tokenizer.decode(new[: len(new) - len(stop)], skip_special_tokens=True)),
    }
    _show(row, json)


def _show(row: dict[str, Any], json: Path | None) -> None:
    err.print(_summary(row), highlight=False)
    for note in row.get("notes", ()):
        err.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    write_json(json, row)


def _run(
    model: PreTrainedModel, ids: Tensor, tokens: int, streamed: Streamed | None = None
) -> tuple[ArkvCache, list[int]]:
    """Generate greedily: the cache afterwards and the new tokens."""
    cache = ArkvCache(model)
    result: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        streamer=streamed,
    )
    return cache, result[0, ids.shape[1] :].tolist()


def sizes_of(cache: ArkvCache) -> dict[str, Any]:
    """Bytes held, and those of full caches of the same length: in the model's dtype, in 16 bits."""
    session = cache.session
    layers = list(session.layers.values())
    full, half = (
        sum(s.plan.full_nbytes(cache.seen, s.batch, dtype) for s in layers)
        for dtype in (None, torch.bfloat16)
    )
    for tensor in (t for plain in session.plain.values() for t in plain.tensors):
        full += tensor.nbytes
        half += tensor.numel() * torch.bfloat16.itemsize
    held = cache.nbytes()
    return {
        "bytes": held,
        "full_bytes": full,
        "compression": full / held,
        "full_bytes_16bit": half,
        "compression_16bit": half / held,
    }


def _summary(row: dict[str, Any]) -> str:
    decode = row["decode_tokens_per_second"]
    full = ""
    # Where nothing is compiled beforehand the prompt is traced as it is read.
    traced = " with tracing" if row.get("compile") in UNCOMPILED else ""
    if "full_bytes" in row:
        full = "; " + against_full(
            row["bytes"], row["full_bytes"], row["full_bytes_16bit"], [row["dtype"]]
        )
    return (
        f"{row['prompt_tokens']} + {row['new_tokens']} tokens; first token after "
        f"{row['first_token_seconds']:.1f} s, start-up included; "
        f"prefill {row['prefill_tokens_per_second']:.1f} tokens/s{traced}, "
        f"decode {f'{decode:.1f}' if decode else '-'} tokens/s; "
        f"cache {row['bytes'] / 2**20:.2f} MiB{full}"
    )
