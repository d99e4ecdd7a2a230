"""Models that keep a cache of their own: the exported graphs answer as the model does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine_cases as cases
import numpy as np
import onnx
import pytest
import torch
from models_outside import gpt_fast, x_transformers
from models_outside.sample import TOLERANCE, TOTAL, VOCABULARY, ids, random_weights
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import arkv_fx
from arkv_fx import ArkvConfig
from arkv_fx.compile.backend import ArkvBackend
from arkv_fx.errors import EngineError, ExportError
from arkv_fx.runtime import OnnxSession
from arkv_fx.state import anchors, buffers
from arkv_fx.state.session import LayerState

WHOLE = ArkvConfig(budget=64, window=4, sinks=2, tiers=("native",))
LONGEST = 64


@pytest.fixture(autouse=True)
def no_graphs_of_the_last_test() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Static(nn.Module):
    """Buffers [B, S, H, D] in plain attributes, written from a start on, read as far as filled.

    The way of the first Llama: the start is a number in Python, and the mask is made for prompts.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(VOCABULARY, 24), nn.Linear(24, 72)
        self.out = nn.Linear(24, VOCABULARY)
        self.table = torch.randn(LONGEST, 24, generator=torch.Generator().manual_seed(2))
        self.k, self.v = (torch.zeros(batch, LONGEST, 3, 8) for _ in range(2))

    def forward(self, ids: Tensor, start: int) -> Tensor:
        batch, length = ids.shape
        x = self.embed(ids) + self.table[start : start + length]
        q, k, v = (y.unflatten(-1, (3, 8)) for y in self.qkv(x).chunk(3, -1))
        self.k[:batch, start : start + length] = k
        self.v[:batch, start : start + length] = v
        keys, values = (y[:batch, : start + length].transpose(1, 2) for y in (self.k, self.v))
        mask = None
        if length > 1:
            mask = torch.full((length, length), float("-inf")).triu(1)
            mask = torch.hstack([torch.zeros(length, start), mask])
        y = scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Growing(nn.Module):
    """Past tensors [B, T, H, D], in a dictionary, with positions from the size of the past."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.window = window
        self.embed, self.qkv = nn.Embedding(VOCABULARY, 24), nn.Linear(24, 72)
        self.out, self.table = nn.Linear(24, VOCABULARY), nn.Embedding(LONGEST, 24)

    def forward(self, ids: Tensor, flag: bool = False, past: Any = None) -> dict[str, Any]:
        before = past[0].shape[1] if past is not None else 0
        x = self.embed(ids) + self.table(torch.arange(ids.shape[1]) + before)
        q, k, v = (y.unflatten(-1, (3, 8)) for y in self.qkv(x).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        if self.window:
            mask = mask.triu(k.shape[1] - q.shape[1] - self.window)
        y = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        return {"past": (k, v), "logits": self.out(y.transpose(1, 2).flatten(2))}


def fast(batch: int, **options: Any) -> nn.Module:
    model = random_weights(gpt_fast.Transformer(gpt_fast.ModelArgs(**options)))
    model.setup_caches(batch, LONGEST)
    return model


def weighted(model: nn.Module) -> nn.Module:
    """The same weights for every model of its kind, biases included."""
    generator = torch.Generator().manual_seed(3)
    for p in random_weights(model).parameters():
        if p.dim() == 1:
            p.data.normal_(generator=generator)
    return model


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "gpt_fast": fast,
    "flex": lambda batch: fast(batch, flex=True),
    "static": lambda batch: weighted(Static(batch)),
    "x_transformers": lambda batch: weighted(x_transformers.Decoder()),
    "einsum": lambda batch: weighted(x_transformers.Decoder(flash=False)),
    "growing": lambda batch: weighted(Growing()),
}


class Caller:
    """Calls a model in its own way, with the tokens behind those of the last call."""

    def __init__(self, call: Callable[..., Any], kind: str) -> None:
        self.call, self.kind, self.seen = call, kind, 0
        self.past: Any = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary]."""
        start, length = self.seen, tokens.shape[1]
        self.seen += length
        tokens = tokens.contiguous()
        if self.kind == "static":
            return self.call(tokens, start)  # type: ignore[no-any-return]
        if self.kind in ("gpt_fast", "flex"):
            return self.call(tokens, torch.arange(start, start + length))  # type: ignore[no-any-return]
        name = "past" if self.kind == "growing" else "intermediates"
        out = self.call(tokens, **({name: self.past} if start else {}))
        logits, self.past = out if isinstance(out, tuple) else (out["logits"], out["past"])
        return logits


SLOW = ("flex", "einsum", "gpt_fast", "x_transformers")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in MODELS]
)
def test_token_by_token_is_the_model_itself(kind: str, tmp_path: Path) -> None:
    """Prompts shorter than the window begin token by token."""
    tokens = ids(1)
    full = Caller(MODELS[kind](1), kind)(tokens)
    session = OnnxSession(arkv_fx.export(MODELS[kind](1), None, tmp_path / "e", config=WHOLE))
    for prompt in (2, 20):
        for length in range(prompt, TOTAL + 1):
            if length == prompt:
                found = session.prefill(tokens[:, :length].numpy())
            else:
                found = session.step(tokens[:, length - 1].numpy())
            expected = full[:, length - 1].numpy()
            assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max(), length
    # Negative control: a sequence of the last token alone.
    assert np.abs(session.prefill(tokens[:, -1:].numpy()) - expected).max() > 0.01


def layers() -> list[LayerState]:
    """The states of the two layers (one, of models that have one) that ran last."""
    found = [*anchors._entries.values(), *buffers._entries.values()]
    return [entry.state for entry in found if not entry.storage.expired()]


OFTEN = {
    ("static", "native"),
    ("x_transformers", "int8"),
}
EVICTING = [
    pytest.param(kind, tier, marks=[] if (kind, tier) in OFTEN else [pytest.mark.slow])
    for kind in MODELS
    for tier in ("native", "int8", "int4")
    if kind not in SLOW
]


@pytest.mark.parametrize(("kind", "tier"), EVICTING)
def test_evicting_graphs_do_what_the_compiled_model_does(
    kind: str, tier: str, tmp_path: Path
) -> None:
    tiers = ("int8", "int4") if tier == "int4" else (tier,)
    config = ArkvConfig(budget=16, window=4, sinks=2, tiers=tiers)
    folder = arkv_fx.export(MODELS[kind](2), None, tmp_path / "e", config=config, batch=2)
    session, model = OnnxSession(folder), MODELS[kind](2)
    compiled = torch.compile(model, backend=ArkvBackend(config, compile="reference"))
    for length in (3, 12, 25):
        prompt, call = ids(2, length), Caller(compiled, kind)
        # What is shorter than the window begins token by token.
        for part in prompt.split(1 if length < 5 else length, 1):
            logits = call(part)[:, -1]
        expected = []
        for _ in range(30):
            expected.append(logits.argmax(-1))
            held = cases.signed(cases.layers_state(session, layers()), session)
            logits = call(expected[-1][:, None])[:, -1]
        assert session.generate(prompt.numpy(), 30).tolist() == torch.stack(expected, 1).tolist()
        session.set_state(held, np.array([call.seen - 1] * 2))
        found = session.step(expected[-1].numpy())
        assert np.abs(found - logits.numpy()).max() <= 1e-4 * logits.abs().max()
        after = cases.signed(cases.layers_state(session, layers()), session)
        for name, x in session.state().items():
            off = np.abs(x.astype(np.float64) - after[name])
            if name.endswith(".mass"):  # in parts of each
                off /= np.maximum(np.abs(after[name]), 1)
            # A number may be rounded to the code beside.
            assert off.max() <= (16 if name.endswith(("codes", "novelty")) else 1e-3), name
            assert (off > 1e-3).mean() < 0.01, name
            assert not name.endswith((".pos", ".count", ".seen")) or not off.any(), name
        # Negative control: the step moved something.
        assert any((x != held[name]).any() for name, x in session.state().items())


@pytest.mark.slow
def test_texts_end_where_the_buffers_do_which_are_not_exported(tmp_path: Path) -> None:
    session = OnnxSession(arkv_fx.export(fast(1), None, tmp_path / "e", config=WHOLE))
    for graph in ("prefill.onnx", "decode.onnx"):
        held = onnx.load(tmp_path / "e" / graph, load_external_data=False).graph.initializer
        names = " ".join(x.name for x in held)
        assert "attention.wqkv.weight" in names and "_cache" not in names
    tokens = np.tile(ids(1).numpy(), 2)
    with pytest.raises(EngineError, match="65 tokens: the model knows positions for 64 only"):
        session.prefill(tokens[:, :65])


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) for k in ("gpt_fast", "static", "x_transformers")],
)
def test_engines_take_the_position_as_an_input(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    config = ArkvConfig(budget=64, window=4, sinks=2, tiers=("int8", "int4"))
    options = {"capabilities": ["SM89"], "longest": 60}
    out = arkv_fx.export(
        MODELS[kind](1), None, tmp_path / "e", "tensorrt", config=config, **options
    )
    engines = json.loads((out / "arkv.json").read_text())["engines"]
    given = [[n for n in e["inputs"] if not n.startswith("past_key_values")] for e in engines]
    assert given == [["input_ids"], ["input_ids", "position_ids"]]


class Counting(Static):
    """Counts its tokens itself, in Python or in a buffer."""

    def __init__(self, buffer: bool) -> None:
        super().__init__(1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.buffer, self.seen = buffer, 0

    def forward(self, ids: Tensor, start: int) -> Tensor:
        out = super().forward(ids, start)
        if self.buffer:
            self.calls += 1
            return out * self.calls
        self.seen += ids.shape[1]
        return out * self.seen


class Read(Static):
    """Reads its cache beside its attention."""

    def forward(self, ids: Tensor, start: int) -> Tensor:
        return super().forward(ids, start) + self.k.sum()


class Scaled(Growing):
    """Scales by the number of tokens before in a way that no input gives."""

    def forward(self, ids: Tensor, flag: bool = False, past: Any = None) -> dict[str, Any]:
        out = super().forward(ids, flag, past)
        length = out["past"][0].shape[1]
        return out | {"logits": out["logits"] + torch.ones(length).sum()}


class Asking(Growing):
    """Wants more than tokens and a past."""

    def forward(self, ids: Tensor, past: Any, flag: bool) -> dict[str, Any]:  # type: ignore[override]
        return super().forward(ids, flag, past)


class Cacheless(Growing):
    def forward(self, ids: Tensor, positions: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(ids)["logits"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: x_transformers.Decoder(t5_bias=True), r"layers\.0\.1: its logits have a .* bias"),
        (lambda: Growing(1000), "its logits have a mask .* which grows with the text"),
        (lambda: Counting(False), "by more than the sizes and positions that it is given"),
        (lambda: Counting(True), "it writes to calls in every call, a state"),
        (lambda: Read(1), "the cache is also read by"),
        (Scaled, "torch.ones.* hangs on the number of tokens before this call"),
        (Asking, "is not one graph, called with token ids and positions as past"),
        (Cacheless, r"keeps no cache that is known.*\(insert_cache=True gives a model one"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(
    make: Callable[[], nn.Module], says: str, tmp_path: Path
) -> None:
    model = random_weights(make())
    with pytest.raises(ExportError, match=says):
        arkv_fx.export(model, None, tmp_path / "e", config=WHOLE)
    assert not any(tmp_path.iterdir())


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = random_weights(Counting(False))
    with pytest.raises(ExportError):
        arkv_fx.export(model, None, tmp_path / "e", config=WHOLE)
    assert model.seen == 0 and not model.k.any() and "forward" not in vars(model)
