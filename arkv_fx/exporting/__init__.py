"""``export(model)``: a model with its small cache as graphs that run without it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from arkv_fx.calibration import Calibration, fingerprint
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ExportError, UnknownOptionError
from arkv_fx.exporting import (
    onnx_target,
    tensorrt_target,
    torch_target,
    torch_tensorrt_target,
)
from arkv_fx.exporting.description import describe
from arkv_fx.exporting.output import appearing
from arkv_fx.exporting.programs import make_programs
from arkv_fx.exporting.target import Target
from arkv_fx.kept import find
from arkv_fx.registry import Registry
from arkv_fx.runtime.manifest import FILE
from arkv_fx.transforming import CALIBRATION
from arkv_fx.weights.stored import is_torchao

__all__ = ["TARGETS", "Target", "export"]

TARGETS: Registry[Target] = Registry(
    "target",
    (
        onnx_target.TARGET,
        tensorrt_target.TARGET,
        torch_target.TARGET,
        torch_tensorrt_target.TARGET,
    ),
)


def export(
    model: nn.Module,
    calibration: Calibration | Literal[False] | None,
    out_dir: str | os.PathLike[str],
    target: str = "onnx",
    *,
    config: ArkvConfig | None = None,
    batch: int = 1,
    tokenizer: Any = None,
    insert_cache: bool = False,
    progress: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> Path:
    """Write a prefill graph, a decode graph and ``arkv.json`` with all that a runner must know.

    The prefill graph takes ``input_ids``, ``attention_mask`` (0 for padding on the left) and
    ``position_ids``, int64 [batch, tokens], and gives the last token's ``logits`` [batch, 1,
    vocabulary] and the state ``present.{group}.{tensor}``; the decode graph takes ``input_ids`` and
    ``position_ids`` [batch, 1] and that state as ``past_key_values.{group}.{tensor}``. A state
    tensor holds all layers of equal plans, [layers, batch, ...]; every shape but that of the prompt
    is fixed. Prefill graphs of models outside transformers take ``input_ids`` only: their prompts
    have no padding. ``arkv_fx.runtime.OnnxSession`` runs the files of target "onnx".

    Args:
        model: a causal language model in eval mode, not transformed; left as it is. Of
            transformers; or one that keeps a cache of its own, whose forward takes token ids and
            positions, or token ids and the past that it returned; or with ``insert_cache`` any.
        calibration: from ``arkv_fx.calibrate``; None: what that kept for these weights and options,
            if anything, as for ``transform``; False: none.
        out_dir: a folder that does not exist or is empty. It appears when everything is written.
        target: a name in ``TARGETS``.
        config: budget, formats and ranking; the default one if None.
        batch: sequences that run together.
        tokenizer: saved beside the graphs, if given.
        insert_cache: for a model that knows no cache, whose forward takes token ids [batch, tokens]
            alone: its causal self-attention is given one, see ``transform``.
        progress: called with what is being done.
        options: of the target.

    Returns:
        ``out_dir``.

    Raises:
        UnknownOptionError: for an unknown target or option.
        ExportError: if anything would be lost, with the site and the reason; nothing is written.
        CalibrationError: if the calibration is of another model.

    Example:
        >>> import tempfile, arkv_fx
        >>> from arkv_fx.models import random_model
        >>> folder = tempfile.mkdtemp()
        >>> config = arkv_fx.ArkvConfig(budget=64, window=16)
        >>> out = arkv_fx.export(random_model("llama"), None, folder, "torch", config=config)
        >>> sorted(file.name for file in out.iterdir())
        ['arkv.json', 'decode.pt2', 'prefill.pt2']
    """
    chosen = TARGETS.find(target)
    if unknown := sorted(set(options) - set(chosen.options)):
        raise UnknownOptionError(
            f"target {target!r} has no option {', '.join(unknown)}; it has {list(chosen.options)}"
        )
    if type(batch) is not int or batch < 1:
        raise ExportError(f"batch={batch!r}: must be a whole number >= 1")
    plain, calibration = calibration is False, None if calibration is False else calibration
    for name, value, kind, wanted in (
        ("model", model, nn.Module, "a torch.nn.Module"),
        ("calibration", calibration, Calibration | None, CALIBRATION),
        ("out_dir", out_dir, str | os.PathLike, "the path of a folder, a str or a Path"),
        ("config", config, ArkvConfig | None, "an ArkvConfig, or None for the default one"),
    ):
        if not isinstance(value, kind):
            raise ExportError(f"{name} is a {type(value).__name__}: give {wanted}")
    config = config or ArkvConfig()
    chosen.check(config, **options)
    _check_weights(model, chosen)
    folder = Path(out_dir)
    with appearing(folder) as work:
        identity = fingerprint(model)
        if calibration is not None:
            calibration.check(identity)
        elif not plain:
            calibration = find(model, config)
        progress("capture the model")
        programs = make_programs(model, config, calibration, batch, insert_cache, chosen.portable)
        saved = "tokenizer" if tokenizer is not None else None
        sidecar = describe(model, identity, config, programs, target, saved)
        if tokenizer is not None:
            tokenizer.save_pretrained(work / "tokenizer")
        chosen.write(work, programs, sidecar, progress, **options)
        (work / FILE).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    return folder


def _check_weights(model: nn.Module, target: Target) -> None:
    for name, weight in model.named_parameters():
        if is_torchao(weight):
            raise ExportError(
                f"{name} is quantized by torchao ({type(weight).__name__}), which no target takes: "
                "export the model with its original weights, and quantize the graphs "
                "(ONNX Runtime and TensorRT have tools for that)"
            )
    if held := {p.dtype for p in model.parameters()} & set(target.lacking):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held))
        raise ExportError(
            f"{type(model).__name__} has weights in {names}, which what runs files of target "
            f"{target.name!r} cannot compute with: export model.float() or model.half()"
        )
