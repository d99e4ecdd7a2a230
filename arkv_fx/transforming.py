"""``transform(model)``: the same model object, now computing over an ARKV cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from arkv_fx.calibration import Calibration, fingerprint
from arkv_fx.compile.backend import LOWERINGS
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import ConfigError, TransformError
from arkv_fx.formats import get_format
from arkv_fx.huggingface.first_prompt import unsettled
from arkv_fx.huggingface.layers import cached_layers, head_dims
from arkv_fx.huggingface.model_caches import (
    CONTINUOUS,
    prepare_cache,
    refuse_continuous,
)
from arkv_fx.huggingface.transformed import Transformed
from arkv_fx.huggingface.wrapped import generating_part
from arkv_fx.insert.cached_model import Inserted, insert
from arkv_fx.kept import find
from arkv_fx.options import require_type
from arkv_fx.passes.context import Probe, StandIn
from arkv_fx.weights.quantizing import WEIGHTS, quantize
from arkv_fx.weights.stored import is_torchao

SHARDED = ("FSDPModule", "FullyShardedDataParallel")  # not imported: both pull in a lot
CAPTURED = (
    "a transformed model is compiled already, and its cache stands outside of any graph: call it "
    "as it is; for a graph that leaves torch call arkv_fx.restore(model), then "
    "arkv_fx.export(model, calibration, folder)"
)
CALIBRATION = "what arkv_fx.calibrate returned (Calibration.load reads a file), None or False"


def transform(
    model: nn.Module,
    config: ArkvConfig | None = None,
    calibration: Calibration | Literal[False] | None = None,
    *,
    compile: str = "inductor",
    insert_cache: bool = False,
    sample: Any = None,
    weights: str | None = None,
    keep_weights: bool = True,
) -> nn.Module:
    """Give a model a small KV cache, in place; ``restore`` undoes it.

    ``generate()``, pipelines and evaluation harnesses go on working: the model makes an
    ``ArkvCache`` where it made a ``DynamicCache``. Attention that cannot be rewritten goes on
    computing what it computed, and ``model.arkv.report()`` says which and why.

    Args:
        model: a transformers causal language model in eval mode, or what wraps one (a PEFT model, a
            value head, ``torch.compile(model)``): then that one is transformed.
        config: budget, formats and ranking; the default is a quarter of the bytes at 4096 tokens.
        calibration: what each layer is given, from ``arkv_fx.calibrate``. None: what
            ``calibrate(model, tokenizer=...)`` kept for these weights and options, else what the
            first prompt tells that is long enough (1024 tokens; once more the first of 2048), which
            is kept, too; the logger "arkv_fx" says which. False, and until then: all layers have
            equal budgets, and ``config.oq_ratio``.
        compile: "inductor" to compile the rewritten graph, once for all layers of one shape;
            "eager" to run it as it is, with the fastest kernel of the device; "reference" for
            that with plain torch operators, which define the result; "reduce-overhead" for
            "inductor" with decode steps replayed from a CUDA graph, as in torch.compile: from a
            sequence's second decoded token on. The memory of a sequence that has ended is kept for
            the next. Where steps cannot be recorded ``model.arkv.report()`` says why.
        insert_cache: for a model that knows no cache: its forward takes token ids [B, T] (or
            embeddings [B, T, C]) and answers for all of them. ``model(ids, cache=cache)`` with an
            ``ArkvCache(model)`` then answers for the new tokens, which follow those before; without
            ``cache`` the model is what it was. Tokens may come one by one or many at once, without
            padding.
        sample: with ``insert_cache``, arguments of the forward (one, or a tuple) on which the
            cached forward is checked against the full one; random ids if the forward needs only
            one argument, else the arguments of the first call with a cache.
        weights: "int8" or "int4" to quantize the weights of the linear layers with torchao
            (``arkv-fx[weights]``), activations stay; None leaves all weights as they are, those
            that torchao quantized before, too. Embeddings stay; a head that is tied to one gets
            a weight of its own beside it, so that it is read in fewer bytes, too. In an int4 model
            (groups of 32) heads, and layers whose shape int4 cannot hold, are int8. On a CPU decode
            steps read the codes where they lie. A calibration is that of the original weights.
        keep_weights: with ``weights``, whether the originals stay in memory, beside the quantized
            ones, for ``restore`` to put back, bit for bit. With False each is let go as it is
            replaced, which is what saves memory; ``restore`` then undoes all else and warns.

    Returns:
        The same model object.

    Raises:
        TransformError: if it is transformed already; with ``insert_cache``, if it has no causal
            self-attention or answers otherwise with a cache; with ``weights``, without torchao, or
            with ``insert_cache``, or if weights are quantized already, sharded, or on a device that
            int4 is not packed for.
        CalibrationError: if the calibration is of another model.
        ConfigError: for an argument of another type, ``sample`` without ``insert_cache``, unknown
            ``weights``, or a head dimension that a format of ``config`` cannot store.

    Example:
        >>> import torch, arkv_fx
        >>> from arkv_fx.models import random_model
        >>> config = arkv_fx.ArkvConfig(budget=64, window=16)
        >>> model = arkv_fx.transform(random_model("llama"), config, compile="eager")
        >>> prompt = torch.randint(1, 128, (1, 200))
        >>> model.generate(prompt, max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 204])
        >>> model.arkv.report().fused
        2
    """
    _require_plain(model)
    require_type("config", config, (ArkvConfig, type(None)), "an ArkvConfig, or None")
    if calibration is not False:
        require_type("calibration", calibration, (Calibration, type(None)), CALIBRATION)
    require_type("compile", compile, str, ", ".join(map(repr, LOWERINGS)))
    require_type("insert_cache", insert_cache, bool, "True or False")
    if sample is not None and not insert_cache:
        raise ConfigError(
            "sample: it says how to call a model with insert_cache=True, and that is off"
        )
    require_type("keep_weights", keep_weights, bool, "True or False")
    if weights is None and not keep_weights:
        raise ConfigError("keep_weights=False: it is about weights=, and none are quantized")
    if weights is not None:
        require_type("weights", weights, str, f"{', '.join(map(repr, WEIGHTS))} or None")
    if insert_cache:
        _refuse_quantized(model, weights)
    config = config or ArkvConfig()
    part = model if insert_cache else generating_part(model)
    found = find(part, config) if calibration is None else calibration or None
    if calibration:
        calibration.check(fingerprint(part), len(cached_layers(part)) or None)
    quantized = None if weights is None else quantize(part, weights, keep_weights)
    try:
        if quantized is not None and calibration is None and found is None:
            found = find(part, config)  # what an earlier run learned with these weights
        learns = calibration is None and unsettled(found)
        if insert_cache:
            insert(model, config, found, compile, sample, learns)
        else:
            _transform(model, config, found, compile=compile, learns=learns)
    except BaseException:
        if quantized is not None:
            quantized.restore()
        raise
    model.arkv.quantized = quantized  # type: ignore[union-attr]
    return model


def refuse_capture() -> NoReturn:
    """What a transformed model answers to torch.export, torch.onnx.export and torch.jit.

    Raises:
        TransformError: always, saying what to call instead.
    """
    raise TransformError(CAPTURED)


def _refuse_sharded(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if any(kind.__name__ in SHARDED for kind in type(module).__mro__):
            raise TransformError(
                f"{path or type(model).__name__} is sharded by FSDP, whose hooks gather weights "
                "outside of the graph that is rewritten: load the model whole, or shard it by "
                "tensor parallelism (tp_plan='auto')"
            )


def _refuse_quantized(model: nn.Module, weights: str | None) -> None:
    names = [name for name, weight in model.named_parameters() if is_torchao(weight)]
    if names or weights is not None:
        what = f"{names[0]} is quantized by torchao" if names else f"weights={weights!r}"
        raise TransformError(
            f"insert_cache: {what}, and a model that knows no cache is captured by torch.export, "
            "which takes such weights apart: insert the cache into the model with its own weights"
        )


def _require_plain(model: nn.Module) -> None:
    if hasattr(model, "arkv"):
        raise TransformError("the model is transformed already: call arkv_fx.restore(model) first")
    if not isinstance(model, nn.Module):
        raise TransformError(f"transform takes an nn.Module, not a {type(model).__name__}")


def _transform(
    model: nn.Module,
    config: ArkvConfig | None,
    calibration: Calibration | None,
    *,
    compile: str,
    probe: Probe | None = None,
    stand_in: StandIn | None = None,
    learns: bool = False,
) -> nn.Module:
    _require_plain(model)
    if (part := generating_part(model)) is not model:
        _transform(
            part, config, calibration, compile=compile, probe=probe, stand_in=stand_in,
            learns=learns,
        )  # fmt: skip
        if not hasattr(model, "arkv"):  # some wrappers ask what they wrap
            model.arkv = part.arkv
        return model
    config = config or ArkvConfig()
    _refuse_sharded(model)
    for dim in head_dims(model):  # others, such as those of latents, only a graph knows
        for name in (config.window_format, *config.tiers):
            get_format(name).check(dim, dim)
    state = Transformed(model, config, calibration, compile, probe, stand_in, learns)

    # An outer torch.compile stops here: what is inside is compiled already.
    run: Callable[..., Any] = torch._dynamo.disable(state.run, reason=CAPTURED)

    @functools.wraps(state.original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Dynamo says so itself, with its reason, where it comes to ``run``.
        if not torch.compiler.is_dynamo_compiling() and (
            torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
        ):
            refuse_capture()
        return run(*args, **kwargs)

    model.arkv = state  # type: ignore[assignment]
    model.forward = forward
    model.__dict__["__prepare_scriptable__"] = refuse_capture  # torch.jit.script asks for it
    if hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = functools.partial(prepare_cache, model)  # type: ignore[assignment]
    for name in CONTINUOUS:
        if hasattr(model, name):
            setattr(model, name, lambda *args, name=name, **kwargs: refuse_continuous(name))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``transform``; the same object, as it was.

    Weights that ``transform`` quantized are the originals again, the same parameters; if it did not
    keep them, they stay quantized and a ``UserWarning`` says so.

    Raises:
        TransformError: if the model is not transformed.

    Example:
        >>> import arkv_fx
        >>> from arkv_fx.models import random_model
        >>> model = arkv_fx.transform(random_model("llama"), compile="eager")
        >>> hasattr(arkv_fx.restore(model), "arkv")
        False
    """
    if not hasattr(model, "arkv"):
        raise TransformError(f"{type(model).__name__} is not transformed: nothing to restore")
    state: Transformed | Inserted = model.arkv  # type: ignore[assignment]
    model.__dict__.pop("arkv", None)
    put = ("arkv", "forward", "__prepare_scriptable__", "_prepare_cache_for_generation")
    for name in (*put, *CONTINUOUS):
        state.model.__dict__.pop(name, None)
    state.model.__dict__.update(state.replaced)
    for handle in state.watching:
        handle.remove()
    if state.quantized is not None:
        state.quantized.restore()
    return model
