"""Attention from its definition, one query and one key at a time, and a layer driven by hand.

Nothing here is shared with arkv_fx: slow, float64, and written to be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arkv_fx.kernels.softmax import Knobs
from arkv_fx.ops.attend import attend
from arkv_fx.plan import LayerPlan
from arkv_fx.state.session import LayerState

HIDDEN = float("-inf")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
MASKS = ("none", "bool", "additive", "lowest", "bool-heads", "additive-heads")


@dataclass
class Tokens:
    """What one kv head of one sequence holds: positions [N], keys [N, Dk], values [N, Dv]."""

    pos: list[int]
    k: Tensor
    v: Tensor


def reference_attention(
    q: Tensor,
    start: int,
    held: list[list[Tokens]],
    *,
    scale: float,
    mask: Tensor | None = None,
    sliding: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the queries q [B, Hq, T, Dk] at positions start, start + 1, ...

    `held[b][h]` are the tokens of kv head h of sequence b. Query head i reads kv head
    i // (Hq / Hkv). Column j of the mask [B or 1, Hq or 1, T, S] is position j; without a mask a
    query sees every position up to its own. A query that sees nothing gives zeros.
    """
    batch, heads, length, _ = q.shape
    out = torch.zeros(batch, heads, length, held[0][0].v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            tokens = held[b][h // (heads // len(held[b]))]
            keys, values = tokens.k.double(), tokens.v.double()
            for t in range(length):
                logits = []
                for j, pos in enumerate(tokens.pos):
                    bias = _bias(mask, b, h, t, pos) if mask is not None else 0.0
                    if mask is None and pos > start + t:
                        bias = HIDDEN
                    if sliding and pos <= start + t - sliding:
                        bias = HIDDEN
                    if bias == HIDDEN:
                        logits.append(HIDDEN)
                        continue
                    logit = float(q[b, h, t].double() @ keys[j]) * scale
                    if softcap:
                        logit = softcap * math.tanh(logit / softcap)
                    logits.append(logit + bias)
                sink = HIDDEN if sink_logits is None else float(sink_logits[h])
                top = max([*logits, sink])
                if top == HIDDEN:
                    continue
                weights = torch.tensor([math.exp(x - top) for x in logits], dtype=torch.float64)
                out[b, h, t] = weights @ values / (weights.sum() + math.exp(sink - top))
    return out


def _bias(mask: Tensor, b: int, h: int, t: int, pos: int) -> float:
    value = mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0, t, pos]
    if mask.dtype == torch.bool:
        return 0.0 if bool(value) else HIDDEN
    # transformers hides with the lowest finite number.
    return float(value) if value > torch.finfo(mask.dtype).min / 2 else HIDDEN


@dataclass
class Layer:
    """One layer's state with the whole history beside it."""

    plan: LayerPlan
    batch: int
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    valid: Tensor = field(init=False)

    def __post_init__(self) -> None:
        plan, dtype = self.plan, self.plan.dtype
        self.state = LayerState(plan, self.batch, torch.device("cpu"))
        self.k = torch.zeros(self.batch, plan.heads, 0, plan.k_dim, dtype=dtype)
        self.v = torch.zeros(self.batch, plan.heads, 0, plan.v_dim, dtype=dtype)
        self.valid = torch.zeros(self.batch, 0, dtype=torch.bool)

    @property
    def seen(self) -> int:
        """Positions so far."""
        return self.k.shape[2]

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        knobs: Knobs,
        valid: Tensor,
        fresh: bool = False,
    ) -> Tensor:
        """`attend`, with what came in remembered."""
        out = attend(q, k, v, mask, self.state.tensors, self.plan, knobs, fresh)
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.valid = torch.cat([self.valid, valid], 1)
        return out

    def everything(self) -> list[list[Tokens]]:
        """The full cache: every token that ever came, padding included."""
        pos = list(range(self.seen))
        return [
            [Tokens(pos, self.k[b, h], self.v[b, h]) for h in range(self.plan.heads)]
            for b in range(self.batch)
        ]

    def held(self) -> list[list[Tokens]]:
        """What the slots hold, read back from their codes."""
        return [[self._held(b, h) for h in range(self.plan.heads)] for b in range(self.batch)]

    def _held(self, b: int, h: int) -> Tokens:
        pos: list[int] = []
        sides: list[list[Tensor]] = [[], []]
        dims = (self.plan.k_dim, self.plan.v_dim)
        for segment in self.state.view().segments:
            slots = (segment.pos[b, h] >= 0).nonzero().flatten()
            pos += segment.pos[b, h, slots].tolist()
            for side, (codec, fields), dim in zip(sides, segment.parts(), dims, strict=True):
                if len(slots):
                    codes = [f[b, h, slots] for f in fields]
                    side.append(codec.from_stored(codec.decode(codes, dim, torch.float32)))
            if len(slots) and segment.centre is not None:
                sides[0][-1] = sides[0][-1] + segment.centre[b, h]
        return Tokens(
            pos, *(torch.cat([torch.zeros(0, d), *s]) for s, d in zip(sides, dims, strict=True))
        )


def join(a: list[list[Tokens]], b: list[list[Tokens]]) -> list[list[Tokens]]:
    """Both groups of tokens, per sequence and head."""
    return [
        [
            Tokens(x.pos + y.pos, torch.cat([x.k.double(), y.k.double()]),
                   torch.cat([x.v.double(), y.v.double()]))
            for x, y in zip(row_a, row_b, strict=True)
        ]
        for row_a, row_b in zip(a, b, strict=True)
    ]  # fmt: skip


def make_mask(
    valid: Tensor,
    length: int,
    *,
    kind: str,
    heads: int = 1,
    sliding: int = 0,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """The mask of the last `length` of the positions `valid` [B, S], as transformers makes it.

    Args:
        kind: "none"; "bool", "additive" (hiding with -inf) or "lowest" (with the lowest finite
            number) [B, 1, T, S]; the same with "-heads" at the end: one mask per query head, each
            hiding some more (or, additive, biasing) at random.
    """
    if kind == "none":
        return None
    batch, total = valid.shape
    rows = torch.arange(total - length, total)[:, None]
    columns = torch.arange(total)[None]
    shown = (columns <= rows) & (columns > rows - sliding if sliding else columns >= 0)
    mask = (shown[None] & valid[:, None])[:, None]
    bias = torch.zeros(mask.shape)
    if kind.endswith("-heads"):
        shape = (batch, heads, length, total)
        keep = torch.rand(shape, generator=generator) < 0.8
        keep[:, 0] |= rows == columns  # a real token attends to itself in some head
        mask = mask & keep
        bias = torch.randn(shape, generator=generator)
    if kind.startswith("bool"):
        return mask
    hidden = torch.finfo(dtype).min if kind.startswith("lowest") else HIDDEN
    return bias.to(dtype).masked_fill(~mask, hidden)
