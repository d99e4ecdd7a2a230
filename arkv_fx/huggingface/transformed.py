"""A transformed model's forward: its arguments, its cache, its compiled graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from arkv_fx.calibration import Calibration
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.config import ArkvConfig
from arkv_fx.errors import CacheError
from arkv_fx.huggingface import first_prompt
from arkv_fx.huggingface.attention_interface import OpenAttention, masks_left_out
from arkv_fx.huggingface.bound import Bound
from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.compiled import CompiledForward
from arkv_fx.huggingface.gradients import (
    is_differentiated,
    refuse_int4_backward,
    without_backward,
)
from arkv_fx.huggingface.inner import watch
from arkv_fx.huggingface.layers import (
    cached_layers,
    kept_whole,
    positions_to_come,
    text_config,
    windows,
)
from arkv_fx.huggingface.model_caches import (
    CACHE_NAMES,
    CONTINUOUS,
    is_encoder_decoder,
    new_cache,
    only_looks_ahead,
    our_cache,
    refuse_foreign,
    take_cache,
)
from arkv_fx.huggingface.positions import require_onward
from arkv_fx.huggingface.unfilled import as_now, with_unfilled
from arkv_fx.huggingface.unread import warn_if_scored
from arkv_fx.passes.context import Probe, StandIn
from arkv_fx.plan import limit_of
from arkv_fx.report import Report
from arkv_fx.state.journal import DEPTH, Journal, kept_in
from arkv_fx.weights.stored import stored

_NAMES = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
# Arguments whose second dimension counts tokens.
GROWING = (*_NAMES, *(f"decoder_{name}" for name in _NAMES))


class Transformed(Bound):
    """What ``model.arkv`` is: configuration, compiled forward and report of a transformed model."""

    records = True  # tokens of its caches can be taken back

    def __init__(
        self,
        model: nn.Module,
        config: ArkvConfig,
        calibration: Calibration | None,
        compile: str,
        probe: Probe | None = None,
        stand_in: StandIn | None = None,
        learns: bool = False,
    ) -> None:
        self.name = f"{type(model).__name__}#{id(model):x}"
        self.config, self.lowering = config, compile
        self.learns = learns  # from the first long prompt
        self.text_config = text_config(model)
        self.open_attention = OpenAttention(self.text_config)
        layers = cached_layers(model)
        self.windows = windows(layers)
        backend = ArkvBackend(
            config, calibration, compile=compile, sliding=self.windows, probe=probe,
            stand_in=stand_in, whole=kept_whole(layers), positions=positions_to_come(model, config),
        )  # fmt: skip
        self.original: Callable[..., Any] = model.forward
        # Attributes of the instance that restore puts back (hooks set forward there).
        names = ("forward", "_prepare_cache_for_generation", *CONTINUOUS)
        self.replaced = {n: model.__dict__[n] for n in names if n in model.__dict__}
        self.compiled = self.compiled_by(backend)
        self.others: list[CompiledForward] = []  # of sequences from files
        self.watching = watch(model)
        self.model = model
        self.int4 = any(w is not None and w.kind == "int4" for w in map(stored, model.parameters()))
        self.mask_name = "decoder_attention_mask" if is_encoder_decoder(model) else "attention_mask"
        self.positions_name = self.mask_name.replace("attention_mask", "position_ids")
        # Some hand the cache on to their decoder without naming it.
        signature = inspect.signature(model.forward).parameters
        generates = bool(getattr(model, "can_generate", bool)())
        self.hands_on = generates and any(p.kind is p.VAR_KEYWORD for p in signature.values())
        # Forward arguments by position, up to the first that can only be given by name.
        self.parameters = [
            name
            for name, p in signature.items()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        # What a model outside transformers may call a cache is its own.
        self.cache_names = CACHE_NAMES if isinstance(model, PreTrainedModel) else CACHE_NAMES[:1]
        known = [name for name in self.cache_names if name in self.parameters]
        self.cache_name = known[0] if known else self.cache_names[-1]

    @property
    def backend(self) -> ArkvBackend:
        """What compiles the graphs of sequences that begin."""
        return self.compiled.backend

    @property
    def calibration(self) -> Calibration | None:
        """That of sequences that begin."""
        return self.compiled.calibration

    def report(self) -> Report:
        """Every attention site seen so far: fused or not and why, slots and bytes.

        A model that has not generated yet is run once on a few tokens; one without weights
        (``arkv_fx.models.skeleton``) is only traced.
        """
        sites = [site for found in self.backend.sites for site in found]
        # What ran without a cache says nothing about what generation does.
        unknown = not any(s.source for s in sites) if self._wants_cache(None) else not sites
        if unknown and "input_ids" in self.parameters:
            weight = next(self.model.parameters())
            mode = weight.fake_mode if isinstance(weight, FakeTensor) else nullcontext()
            with mode, torch.no_grad():
                ids = torch.zeros(1, 8, dtype=torch.long, device=weight.device)
                both = {"decoder_input_ids": ids} if is_encoder_decoder(self.model) else {}
                self.model(ids, **both)
        return Report.of(
            self.backend.sites, self.config, self.weight_notes() + self.backend.notes()
        )

    def compiled_by(self, backend: ArkvBackend) -> CompiledForward:
        """The model's forward, compiled."""
        return CompiledForward(self.original, backend, self.name)

    def under(self, calibration: Calibration | None) -> CompiledForward:
        """The compiled forward of sequences whose plans are by ``calibration``."""
        for known in (self.compiled, *self.others):
            if known.calibration == calibration:
                return known
        self.others.append(self.compiled_by(self.another_backend(calibration)))
        return self.others[-1]

    def another_backend(self, calibration: Calibration | None) -> ArkvBackend:
        """One like ``backend``, with plans by ``calibration``."""
        return ArkvBackend(
            self.config, calibration, compile=self.lowering, sliding=self.windows,
            whole=self.backend.whole, positions=self.backend.positions,
        )  # fmt: skip

    def _answer(self, cache: ArkvCache, kwargs: dict[str, Any]) -> Any:
        """A call with a cache: by the graphs that its sequence began with, or the newest."""
        ids: Any = kwargs.get("input_ids")
        known = isinstance(ids, Tensor) and ids.dim() == 2
        if self.learns and known and first_prompt.wanted(self, cache, ids):
            self.learns = False  # another thread need not
            try:
                out = first_prompt.serve(self, cache, kwargs, ids.shape[1])
            except BaseException:
                self.learns = True
                raise
            if out is not None:
                self.learns = first_prompt.unsettled(self.compiled.calibration)
                cache.compiled = self.compiled
                return out
        if cache.seen == 0 or cache.compiled is None:
            cache.compiled = self.compiled
        calls = cache.compiled.backend.calls
        out = cache.compiled(**kwargs)
        if cache.compiled.backend.calls == calls:
            raise CacheError(
                "the model ran without its compiled graphs, so nothing was compressed: "
                "compilation is switched off, or another torch.compile reached Dynamo's "
                "recompile limit on the same code; call torch._dynamo.reset() and raise "
                "torch._dynamo.config.recompile_limit"
            )
        return out

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with an ArkvCache where a cache is wanted.

        A cache is not differentiated. With gradients on, a call that names neither a cache nor
        ``use_cache`` answers as the model did before, with gradients; the cache that it returns
        is filled by a second run when it is first used, which ``torch.no_grad()`` saves.
        """
        out = self._run(*args, **kwargs)
        if self.int4 and torch.is_grad_enabled():
            refuse_int4_backward(out)
        return out

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        refuse_foreign(kwargs, self.cache_names)
        given = self.hands_on or any(name in kwargs for name in self.cache_names)
        if self.cache_name not in self.parameters and not given:
            return self.compiled(*args, **kwargs)
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = take_cache(kwargs, self.cache_names)
        wanted = cache is None and self._wants_cache(kwargs.get("use_cache"))
        if wanted and kwargs.get("use_cache") is None:
            if is_differentiated(kwargs.values(), self.model.parameters()):
                return self._differentiated(kwargs)
        if wanted:
            warn_if_scored(kwargs.get("input_ids"), self.config.window)
            cache = new_cache(self.model)
        if cache is not None:
            kwargs[self.cache_name] = cache
        if cache is None:
            # Else the model would make a cache of its own, which nobody compresses.
            return self.compiled(**{**kwargs, **self._known(use_cache=False)})
        cache = our_cache(cache, self.model)
        with cache.turn():
            out = self._step(cache, kwargs)
        if is_differentiated(kwargs.values(), self.model.parameters()):
            return without_backward(out)
        return out

    def _step(self, cache: ArkvCache, kwargs: dict[str, Any]) -> Any:
        """The forward with a cache of ours among its arguments."""
        cache.require(self)
        self._require_room(cache, kwargs)
        if self.model.training and torch.is_grad_enabled():
            raise CacheError(
                "the cache is not differentiated: use torch.no_grad(), model.eval() or "
                "use_cache=False"
            )
        mask = kwargs.get(self.mask_name)
        require_onward(cache, kwargs.get(self.positions_name), mask)
        require_onward(cache, kwargs.get("cache_position"), mask)
        if self.mask_name in kwargs:
            kwargs[self.mask_name] = self._needed_mask(cache, kwargs)
        encoder = kwargs.get("attention_mask") if self.mask_name != "attention_mask" else None
        if isinstance(encoder, Tensor) and encoder.dim() == 2 and bool(encoder.all()):
            # It says nothing; and `generate` cuts it to a chunk of the decoder's prompt.
            kwargs["attention_mask"] = None
        self._mark_lengths(kwargs)
        cache.session.active = True
        try:
            kept = _kept(cache.session.journal, kwargs.get("logits_to_keep"))
            with torch.no_grad(), self.open_attention.step(), masks_left_out(), kept:
                out = self._answer(cache, kwargs)
        finally:
            cache.session.active = False
        cache.end_step()
        cache.session.tokens = cache.seen
        return out

    def _require_room(self, cache: ArkvCache, kwargs: dict[str, Any]) -> None:
        """Refuse tokens beyond the positions that the plans know, before anything has changed.

        Those of arguments of other names are seen by the graphs' runner.
        """
        limit = limit_of(self.backend.positions)
        prefix = self.mask_name.removesuffix("attention_mask")
        given = [kwargs.get(prefix + name) for name in _NAMES[:2]]
        lengths = [x.shape[1] for x in given if isinstance(x, Tensor) and x.dim() >= 2]
        if limit is not None and lengths:
            cache.session.require_room(limit, lengths[0])

    def _differentiated(self, kwargs: dict[str, Any]) -> Any:
        """A call with gradients, as the model was, and a cache to be filled if it is used."""
        given = as_now(kwargs)

        def fill(whole: Any) -> None:
            with torch.no_grad():
                self.run(**{**given, **self._known(use_cache=True), self.cache_name: whole})

        parted = kwargs.get("return_dict") is False
        parted = parted or not getattr(self.model.config, "return_dict", True)
        out = self.compiled(**{**kwargs, **self._known(use_cache=False, return_dict=True)})
        out = with_unfilled(out, self.cache_names, new_cache(self.model), fill)
        return out.to_tuple() if parted and hasattr(out, "to_tuple") else out

    def _known(self, **options: Any) -> dict[str, Any]:
        """Those of the options that the model's forward takes."""
        return {n: x for n, x in options.items() if n in self.parameters or self.hands_on}

    def _wants_cache(self, use: bool | None) -> bool:
        if self.model.training and torch.is_grad_enabled():
            return False
        if use is None and only_looks_ahead(self.model):
            return False
        if use is None:
            use = getattr(self.text_config, "use_cache", False)
        return bool(use)

    def _needed_mask(self, cache: ArkvCache, kwargs: dict[str, Any]) -> Any:
        """The mask, or None where it says nothing that the cache does not know.

        Padding is never stored, so a decoded token may see all that is held: without the mask,
        which grows, its graph has fixed shapes. Positions must not hang on the mask then.
        """
        mask, before = kwargs.get(self.mask_name), cache.session.mask
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            cache.session.mask = None
            return mask
        cache.session.mask = mask
        if bool(mask.all()):  # no [T, S] mask is built at all
            return None
        known = (
            before is not None
            and kwargs.get("position_ids") is not None
            # An attention that is not rewritten has its padding in its cache.
            and not cache.session.plain
            and not getattr(self.text_config, "alibi", False)
            # Chunks of attention are counted from the first token that is no padding.
            and not getattr(self.text_config, "attention_chunk_size", None)
            and before.shape[1] == cache.seen == mask.shape[1] - 1
            and torch.equal(before, mask[:, :-1])
            and bool(mask[:, -1].all())
            and cache.session.counts(before.sum(1))
        )
        return None if known else mask

    def _mark_lengths(self, kwargs: dict[str, Any]) -> None:
        """Let one graph serve prompts of every length."""
        for name in GROWING:
            x = kwargs.get(name)
            if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(x, 1)


def _kept(journal: Journal | None, logits: Any) -> AbstractContextManager[None]:
    """Steps are written into ``journal``; ``logits`` is the model's ``logits_to_keep``.

    Whoever judges a draft asks for the logits of its tokens and of the one before them.
    """
    if journal is not None:
        journal.expect(logits - 1 if isinstance(logits, int) and logits > 0 else DEPTH)
    return kept_in(journal)
