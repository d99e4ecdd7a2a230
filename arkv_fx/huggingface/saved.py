"""A sequence's cache in a file: a prefix that other processes go on from."""

from __future__ import annotations

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arkv_fx.calibration import Calibration, fingerprint
from arkv_fx.errors import ArkvError, CacheError
from arkv_fx.files import instead_of
from arkv_fx.plan import LayerPlan
from arkv_fx.state.session import LayerState, PlainLayer, Session

VERSION = 4
KEY = "arkv_cache"
NO_MATTER = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
"""What a model's config says of how it is stored or called, not of what it computes."""


def write(
    path: str | PathLike[str], session: Session, owner: Any, calibration: Calibration | None
) -> None:
    """Save the states of all layers; ``owner`` is the ``model.arkv`` that they are of.

    Their plans are by ``calibration``, which the model need not have when they are read.

    Raises:
        CacheError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {} if session.mask is None else {"mask": session.mask}
    for index, state in session.layers.items():
        tensors.update({f"{index}.{name}": t for name, t in state.named().items()})
    for index, plain in session.plain.items():
        tensors.update(zip((f"{index}.keys", f"{index}.values"), plain.tensors, strict=False))
    said = {
        "version": VERSION,
        **_of_model(owner),
        "calibration": None if calibration is None else calibration.to_json(),
        "tokens": session.tokens,
        "plans": {index: state.plan.to_json() for index, state in session.layers.items()},
        "plain": list(session.plain),
    }
    try:
        with instead_of(path) as partial:
            owned = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(owned, partial, metadata={KEY: json.dumps(said)})
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path}: the cache cannot be written: {error}") from error


def read(path: str | PathLike[str], session: Session, owner: Any) -> Calibration | None:
    """Fill an empty session with what ``write`` saved; the calibration that its plans are by.

    Raises:
        CacheError: if the file is damaged, of another version, or was saved for another model,
            dtype or configuration.
    """
    if not Path(path).is_file():
        raise CacheError(f"{path}: there is no such file of a cache")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise CacheError(f"{path}: no file of a cache: ArkvCache.save writes these")
            said = json.loads(text)
            _check(path, said, owner)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        _fill(session, said, tensors, next(owner.model.parameters()).device)
        given = said["calibration"]
        return None if given is None else Calibration.from_json(given, Path(path))
    except CacheError:
        raise
    except (ArkvError, SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{path}: the file of a cache is damaged: {error!r}") from error


def _of_model(owner: Any) -> dict[str, Any]:
    """What must be the same of a model for its caches to be."""
    dtype = str(next(owner.model.parameters()).dtype).removeprefix("torch.")
    config = json.loads(json.dumps(owner.config.to_dict()))  # as it comes back from a file
    digest = hashlib.sha256(_settings(owner.model).encode()).hexdigest()[:16]
    return {
        "model": fingerprint(owner.model), "settings": digest, "dtype": dtype, "config": config
    }  # fmt: skip


def _settings(model: Any) -> str:
    """What a model computes beside its weights (the base of its rotations, say), as it tells it."""
    whole: Any = getattr(model, "config", None)
    said = whole.to_dict() if hasattr(whole, "to_dict") else {}
    told = {name: value for name, value in said.items() if name not in NO_MATTER and name[0] != "_"}
    return json.dumps(told, sort_keys=True, default=str)


def _check(path: str | PathLike[str], said: dict[str, Any], owner: Any) -> None:
    if said["version"] != VERSION:
        raise CacheError(
            f"{path}: a cache of version {said['version']!r}, this arkv_fx reads {VERSION}: save "
            "it again"
        )
    here = _of_model(owner)
    for name, what in (
        ("model", "another model or other weights"),
        ("settings", "a model of another config (of its positions, say)"),
        ("dtype", "another dtype"),
    ):
        if said[name] != here[name]:
            raise CacheError(
                f"{path}: the cache was saved for {what} ({said[name]!r}, this is {here[name]!r})"
            )
    other = sorted(k for k, v in here["config"].items() if said["config"].get(k) != v)
    if other:
        there = {name: said["config"].get(name) for name in other}
        raise CacheError(
            f"{path}: the cache was saved under another configuration: {there}; transform the "
            "model with that, or save it again"
        )


def _fill(
    session: Session, said: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> None:
    layers: dict[int, LayerState] = {}
    for index, text in said["plans"].items():
        plan = LayerPlan.parse(text)
        batch, found = len(tensors[f"{index}.count"]), []
        for name, spec in zip(plan.places, plan.specs(), strict=True):
            held = tensors.pop(f"{index}.{name}")
            if held.shape != (batch, *spec.shape) or held.dtype != spec.dtype:
                raise CacheError(
                    f"layer {index}: {name} is {held.dtype} {tuple(held.shape)} in the file of a "
                    f"cache, not {spec.dtype} {(batch, *spec.shape)}: it is damaged"
                )
            with torch.inference_mode(False):
                found.append(held.to(device).clone())
        layers[int(index)] = LayerState.of(plan, found)
    plains = {int(index): PlainLayer() for index in said["plain"]}
    for index, plain in plains.items():
        names = (f"{index}.keys", f"{index}.values")
        plain.tensors = [tensors.pop(name).to(device) for name in names if name in tensors]
    mask = tensors.pop("mask", None)
    tokens = said["tokens"]
    counted = {int(n) for state in layers.values() for n in state["seen"]}
    counted |= {plain.tensors[0].shape[-2] for plain in plains.values() if plain.tensors}
    if tensors or type(tokens) is not int or counted - {tokens}:
        raise CacheError(
            f"the file of a cache is damaged: it says {tokens!r} tokens where its layers hold "
            f"{sorted(counted)}, and has {sorted(tensors)} beside them"
        )
    session.layers.update(layers)
    session.plain.update(plains)
    session.tokens, session.mask = tokens, None if mask is None else mask.to(device)
