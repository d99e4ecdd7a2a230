"""A case played with one model: every call, what it answered, and what was held then."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fuzz_cases import Case, Group, Turn
from fuzz_models import ENCODERS, HIDDEN, SOURCE, START
from torch import Tensor
from transformers import PreTrainedModel

from arkv_fx.huggingface.cache import ArkvCache
from arkv_fx.huggingface.model_caches import new_cache
from arkv_fx.zoo.drive import Encoded

Held = list[list[Tensor]]  # [layer][segment] positions [B, Hkv, slots], sorted


@dataclass(frozen=True)
class Text:
    """Tokens so far [B, S], 1 where they are real; of an encoder's answer [B, SOURCE, HIDDEN]."""

    ids: Tensor
    mask: Tensor
    source: Tensor
    source_mask: Tensor

    def add(self, ids: Tensor, mask: Tensor) -> Text:
        """With tokens behind."""
        ids, mask = (torch.cat(pair, 1) for pair in ((self.ids, ids), (self.mask, mask)))
        return replace(self, ids=ids, mask=mask)

    def rows(self, rows: list[int]) -> Text:
        """Some of the rows."""
        parts = (self.ids, self.mask, self.source, self.source_mask)
        return Text(*(part[rows] for part in parts))


@dataclass(frozen=True)
class Call:
    """The last ``size`` tokens of ``text`` were read; logits [B, size, vocabulary].

    ``rows`` of the call before are those of this one; None where a new sequence begins.
    """

    text: Text
    size: int
    logits: Tensor
    held: Held
    rows: list[int] | None


def held(cache: Any) -> Held:
    """The positions of all tokens that a cache holds."""
    ours: ArkvCache = getattr(cache, "self_attention_cache", cache)
    layers = sorted(ours.session.layers.items())
    return [[s.pos.sort(-1).values for s in state.view().segments] for _, state in layers]


@torch.no_grad()
def read(model: PreTrainedModel, text: Text, size: int, cache: Any, group: Group) -> Tensor:
    """Logits [B, size, V] of the last tokens; without a cache those of a forward of the whole."""
    prefix = "decoder_" if group.architecture in ENCODERS else ""
    ids = text.ids if cache is None else text.ids[:, -size:]
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = _source(text) if prefix else {}
    inputs[f"{prefix}input_ids"] = ids
    if group.padding != "none":
        inputs["attention_mask"] = text.mask
    if group.positions and "position_ids" in accepted:
        inputs["position_ids"] = (text.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    answer = model(**inputs, past_key_values=cache, use_cache=cache is not None)
    logits: Tensor = answer.logits[:, -size:]
    return logits.float()


def _source(text: Text) -> dict[str, Any]:
    encoded = Encoded(last_hidden_state=text.source, attention_mask=text.source_mask)
    return {"encoder_outputs": encoded, "attention_mask": text.source_mask}


@dataclass
class Play:
    """One case played to its end by ``run``; ``calls`` are those that the sequence went through.

    ``asides`` are calls of copies that were dropped.
    """

    model: PreTrainedModel
    case: Case
    calls: list[Call] = field(default_factory=list)
    asides: list[Call] = field(default_factory=list)

    def run(self) -> Play:
        """Play all turns."""
        group = self.case.group
        self.random = torch.Generator().manual_seed(self.case.seed)
        self._begin()
        for number, turn in enumerate(self.case.turns):
            if turn.what in ("read", "reset"):
                if turn.what == "reset":
                    self.cache.reset()
                    self._begin()
                self._read(turn.size, first=number == 0 or turn.what == "reset")
            elif turn.what == "steps":
                self._steps(turn.size)
            elif turn.what == "select":
                self._select(torch.randint(group.batch, (group.batch,), generator=self.random))
            elif turn.what == "narrow":
                self._narrow(turn)
            elif turn.what == "fork":
                self._fork(turn)
            else:
                self._generate(turn)
        return self

    def _begin(self) -> None:
        batch, dtype = self.case.group.batch, self.case.group.dtype
        source = torch.randn(batch, SOURCE, HIDDEN, generator=self.random).to(dtype)
        source_mask = torch.ones(batch, SOURCE, dtype=torch.long)
        source_mask[1:, :4] = 0
        nothing = torch.zeros(batch, 0, dtype=torch.long)
        self.text = Text(nothing, nothing, source, source_mask)
        self.rows: list[int] | None = None
        if not self.calls:
            self.cache = new_cache(self.model)

    def _tokens(self, size: int) -> Tensor:
        return torch.randint(2, 128, (len(self.text.ids), size), generator=self.random)

    def _mask(self, size: int, first: bool) -> Tensor:
        """[B, size]: which of new tokens are real. A row has one, and some row a padded one."""
        padding, batch = self.case.group.padding, len(self.text.ids)
        mask = torch.ones(batch, size, dtype=torch.long)
        if padding == "none" or size == 1 or (padding == "left" and not first):
            return mask
        lengths = torch.randint(1, size + 1, (batch, 1), generator=self.random)
        lengths[-1] = lengths[-1].clamp(max=size - 1)
        columns = torch.arange(size)
        if padding == "left":
            return (columns >= size - lengths).long()
        if padding == "right":
            return (columns < lengths).long()
        holes = torch.rand(batch, size, generator=self.random) < 0.3
        holes[-1, 0], holes[:, -1] = True, False
        return (~holes).long()

    def _read(self, size: int, first: bool = False) -> None:
        ids, mask = self._tokens(size), self._mask(size, first)
        if first and self.case.group.architecture in ENCODERS:
            ids[:, 0] = START
        self._call(ids, mask)

    def _steps(self, size: int) -> None:
        for _ in range(size):
            self._call(self._tokens(1), torch.ones(len(self.text.ids), 1, dtype=torch.long))

    def _call(self, ids: Tensor, mask: Tensor) -> None:
        self.text = self.text.add(ids * mask, mask)
        size = ids.shape[1]
        logits = read(self.model, self.text, size, self.cache, self.case.group)
        self._note(size, logits)

    def _note(self, size: int, logits: Tensor) -> None:
        self.calls.append(Call(self.text, size, logits, held(self.cache), self.rows))
        self.rows = list(range(len(self.text.ids)))

    def _select(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self._follow(rows.tolist())

    def _follow(self, rows: list[int]) -> None:
        """The sequences are now these; perhaps others were chosen since the last call already."""
        self.text = self.text.rows(rows)
        self.rows = self.rows and [self.rows[row] for row in rows]

    def _narrow(self, turn: Turn) -> None:
        batch = len(self.text.ids)
        row = int(torch.randint(batch, (), generator=self.random))
        self.cache.batch_select_indices(torch.tensor([row]))
        self._follow([row])
        self._steps(turn.size)
        self.cache.batch_repeat_interleave(batch)
        self._follow([0] * batch)

    def _fork(self, turn: Turn) -> None:
        before = self.cache, self.text, self.rows, self.calls
        self.cache, self.calls = copy.deepcopy(self.cache), list(self.calls)
        (self._steps if turn.size % 2 else self._read)(turn.size)
        if not turn.ahead:
            self.asides += self.calls[len(before[3]) :]
            self.cache, self.text, self.rows, self.calls = before

    def _generate(self, turn: Turn) -> None:
        group = self.case.group
        if group.padding != "none" and not group.positions:
            return self._steps(turn.size)  # generate() gives positions
        if group.architecture in ENCODERS and not bool((self.text.ids[:, 0] == START).any()):
            return self._steps(turn.size)
        ids = self._tokens(turn.ahead)
        text = self.text.add(ids, torch.ones_like(ids))
        inputs: dict[str, Any] = {"input_ids": text.ids, "attention_mask": text.mask}
        if group.architecture in ENCODERS:
            inputs = {
                **_source(text), "decoder_input_ids": text.ids, "decoder_attention_mask": text.mask
            }  # fmt: skip
        call: Any = self.model.generate
        out = call(
            **inputs, past_key_values=self.cache, max_new_tokens=turn.size, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        new, logits = out.sequences[:, -turn.size :], torch.stack(out.logits, 1).float()
        assert torch.equal(new, logits.argmax(-1)), "generate() took another token than the best"
        self.text = text.add(new[:, :-1], torch.ones_like(new[:, :-1]))
        self._note(turn.size, logits)
        return None
