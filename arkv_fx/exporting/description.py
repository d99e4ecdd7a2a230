"""``arkv.json``: all that a runner must know about exported graphs, without torch."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from arkv_fx.config import ArkvConfig
from arkv_fx.exporting.groups import Group
from arkv_fx.exporting.programs import PAST, PRESENT, Graph, Programs
from arkv_fx.formats.codec import ByteCodec, Codec
from arkv_fx.huggingface.layers import text_config
from arkv_fx.plan import LayerPlan
from arkv_fx.runtime.manifest import VERSION


def describe(
    model: nn.Module, identity: str, config: ArkvConfig, programs: Programs, target: str,
    tokenizer: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The sidecar's content, ready for JSON; ``identity`` is the model's fingerprint."""
    text = text_config(model)
    plans = [LayerPlan.parse(group.plan.to_json()) for group in programs.groups]
    codecs = {c.name: c for plan in plans for f, _ in plan.segments() for c in f.codecs}
    return {
        "version": VERSION,
        "target": target,
        "model": {
            "type": getattr(text, "model_type", type(model).__name__),
            "class": type(model).__name__,
            "fingerprint": identity,
            "vocabulary": programs.vocabulary,
            "eos_token_ids": _eos(model),
        },
        "config": config.to_dict(),
        "batch": programs.batch,
        "least_prompt": programs.least,
        "longest_text": programs.bound,
        "graphs": {graph.name: _io(graph) for graph in programs.graphs},
        "groups": [_group(group) for group in programs.groups],
        "state_bytes": sum(len(g.layers) * g.plan.nbytes(g.batch) for g in programs.groups),
        "packing": {name: _packing(codec) for name, codec in sorted(codecs.items())},
        "tokenizer": tokenizer,
        "versions": {name: version(name) for name in ("arkv-fx", "torch", "transformers")},
    }


def _packing(codec: Codec) -> str:
    said = codec.packing or " ".join((type(codec).__doc__ or "not described").split())
    shifted = "; uint8 fields are held as int8, 128 less"
    return said + shifted if isinstance(codec.exported(), ByteCodec) else said


def _io(graph: Graph) -> dict[str, Any]:
    return {"inputs": list(graph.inputs), "outputs": graph.outputs}


def _group(group: Group) -> dict[str, Any]:
    names = zip(group.names(PAST), group.names(PRESENT), strict=True)
    plan = group.plan
    held = plan.bytes_of
    return {
        "layers": list(group.layers),
        "window": plan.window,
        "sinks": plan.sinks,
        "sliding": plan.sliding,
        "heads": plan.heads,
        "tiers": [{"format": t.format, "slots": t.slots} for t in plan.tiers],
        "tensors": [
            {
                "input": given,
                "output": returned,
                "shape": list(group.shape(spec)),
                "dtype": dtype_name(spec.dtype),
                "bytes_of": dtype_name(held[spec.name]) if spec.name in held else None,
                "fill": spec.fill,
            }
            for spec, (given, returned) in zip(plan.specs(), names, strict=True)
        ],
    }


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype outside of torch."""
    return str(dtype).removeprefix("torch.")


def _eos(model: nn.Module) -> list[int]:
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(text_config(model), "eos_token_id", None)
    return (
        [] if found is None else [int(i) for i in (found if isinstance(found, list) else [found])]
    )
