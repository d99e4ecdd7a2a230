"""What running exported graphs has in common, whatever runs them: prompts, steps, streams."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arkv_fx.errors import EngineError
from arkv_fx.runtime.manifest import Sidecar
from arkv_fx.runtime.sampling import Sampling
from arkv_fx.runtime.tensors import checked
from arkv_fx.runtime.token_ids import Tokens, integers, token_ids

Logits = NDArray[np.float32]
State = list[NDArray[Any]]
"""The state tensors in the order of ``Sidecar.tensors``."""


class GraphSession(ABC):
    """One batch of sequences of an exported model; what runs the graphs is a subclass's.

    A subclass holds the state where its graphs want it, and has the methods without a body below.
    They are called by one thread at a time.
    """

    least = 1
    """The fewest tokens that the prompt's graph takes."""
    longest: int | None = None
    """The most tokens that it takes; None for any number."""

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self.batch = sidecar.batch
        self._lock = RLock()
        self.reset()

    @abstractmethod
    def _empty(self) -> None:
        """Hold the state before the first token."""

    @abstractmethod
    def _put(self, state: State) -> None:
        """Hold this state."""

    @abstractmethod
    def _copy(self) -> State:
        """A copy of the state that is held."""

    @abstractmethod
    def _prompt(self, given: Mapping[str, Tokens]) -> Logits:
        """Run the prompt's graph: logits [B, vocabulary]; hold the state that it gives."""

    @abstractmethod
    def _token(self, given: Mapping[str, Tokens]) -> Logits:
        """Run the decode graph on the state that is held, likewise.

        Raises:
            EngineError: see ``refuse_spoilt``; what was held stays.
        """

    def reset(self) -> None:
        """Forget the sequences."""
        with self._lock:
            self._empty()
            self._next = np.zeros(self.batch, np.int64)
            self._hold = object()  # whose sequences these are: another one for every call

    @property
    def nbytes(self) -> int:
        """Bytes of the state: codes, scales, scores, positions and all."""
        return sum(t.nbytes for t in self.sidecar.tensors)

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of the state by its input names; bfloat16 and float8 are held as their bytes."""
        with self._lock:
            held = self._copy()
        return {t.input: x for t, x in zip(self.sidecar.tensors, held, strict=True)}

    def set_state(self, state: Mapping[str, NDArray[Any]], tokens: ArrayLike) -> None:
        """Go on from what ``state()`` gave (prefix reuse), now or in another process.

        Args:
            tokens: [B] how many tokens of each sequence it has seen, padding not counted.

        Raises:
            EngineError: if tensors are missing or unknown, or not of the shape and dtype of the
                graph's; or for other tokens.
        """
        if not isinstance(state, Mapping):
            raise EngineError(f"state is a {type(state).__name__}; give what state() gave")
        if unknown := sorted(map(str, {*state} - {t.input for t in self.sidecar.tensors})):
            raise EngineError(f"the graphs know no state {', '.join(unknown[:4])}")
        seen = integers("tokens", tokens)
        if seen.shape != (self.batch,) or seen.min() < 0:
            raise EngineError(
                f"tokens={tokens!r}: give the number of tokens seen for each of {self.batch} "
                "sequences"
            )
        found = [checked(state.get(t.input), t) for t in self.sidecar.tensors]
        with self._lock:
            self._put(found)
            self._next, self._hold = seen, object()

    def prefill(self, ids: ArrayLike, mask: ArrayLike | None = None) -> Logits:
        """Begin new sequences.

        Args:
            ids: [B, T] integers, T >= 1.
            mask: [B, T], 0 for padding, which stands on the left; all ones by default.

        Returns:
            The last token's logits [B, vocabulary].

        Raises:
            EngineError: for tokens of another shape, dtype or vocabulary.
        """
        tokens = token_ids(ids, self.sidecar)
        seen = np.ones_like(tokens) if mask is None else integers("mask", mask)
        if seen.shape != tokens.shape or not np.isin(seen, (0, 1)).all():
            raise EngineError(f"mask {seen.shape}: give zeros and ones like the ids {tokens.shape}")
        if (np.diff(seen, axis=1) < 0).any() or not seen[:, -1].all():
            raise EngineError("mask: padding stands on the left, and no sequence is empty")
        self._check_length(tokens.shape[1])
        if not self.sidecar.padding and not seen.all():
            raise EngineError("mask: this model takes no padding; give equally long prompts")
        if self.longest is not None and tokens.shape[1] > self.longest:
            raise EngineError(
                f"a prompt of {tokens.shape[1]} tokens: the engine takes {self.longest} at most; "
                f"`arkv export --target tensorrt --longest {tokens.shape[1]}` takes this one"
            )
        lack = max(0, self.least - tokens.shape[1])
        if lack and not self.sidecar.padding:
            with self._lock:
                self.reset()
                return [self.step(column) for column in tokens.T][-1]
        tokens, seen = (np.pad(x, ((0, 0), (lack, 0))) for x in (tokens, seen))
        positions = np.maximum(seen.cumsum(1) - 1, 0)
        given = {"input_ids": tokens, "attention_mask": seen, "position_ids": positions}
        wanted = self.sidecar.content["graphs"]["prefill"]["inputs"]
        with self._lock:
            self.reset()
            logits = self._prompt({name: given[name] for name in wanted})
            self._next = seen.sum(1)
        return logits

    def step(self, ids: ArrayLike) -> Logits:
        """Go on with one token for each sequence.

        Args:
            ids: [B] or [B, 1] integers.

        Returns:
            Logits [B, vocabulary].
        """
        tokens = integers("ids", ids)
        tokens = token_ids(tokens[:, None] if tokens.ndim == 1 else tokens, self.sidecar)
        if tokens.shape[1] != 1:
            raise EngineError(f"a step takes one token for each sequence, not {tokens.shape[1]}")
        with self._lock:
            self._check_length(int(self._next.max()) + 1)
            logits = self._token({"input_ids": tokens, "position_ids": self._next[:, None]})
            self._next, self._hold = self._next + 1, object()
        return logits

    def stream(
        self, ids: ArrayLike, max_new_tokens: int, *, mask: ArrayLike | None = None,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None,
        stop: Sequence[int] | None = None,
    ) -> Iterator[Tokens]:  # fmt: skip
        """Tokens [B] one after the other; see ``generate``."""
        sampling = Sampling(temperature, top_k, top_p, seed)
        if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
            raise EngineError(f"max_new_tokens={max_new_tokens!r}: must be a whole number >= 1")
        ends = integers("stop", self.sidecar.eos if stop is None else stop).reshape(-1)
        return self._stream(token_ids(ids, self.sidecar), mask, max_new_tokens, sampling, ends)

    def _stream(
        self, ids: Tokens, mask: ArrayLike | None, tokens: int, sampling: Sampling, ends: Tokens
    ) -> Iterator[Tokens]:
        generator = sampling.generator()
        with self._lock:
            logits = self.prefill(ids, mask)
            hold = self._hold
        done = np.zeros(self.batch, bool)
        new = np.zeros(self.batch, np.int64)
        for count in range(tokens):
            if count:
                with self._lock:
                    if self._hold is not hold:
                        raise EngineError(
                            "another call went on with this session while this stream was open: "
                            "finish one before the next, or open a session for each"
                        )
                    logits = self.step(new)
                    hold = self._hold
            # A sequence that is done repeats the token that ended it.
            new = np.where(done, new, sampling.choose(logits, generator))
            yield new
            done = done | np.isin(new, ends)
            if done.all():
                return

    def generate(
        self, ids: ArrayLike, max_new_tokens: int = 128, *, mask: ArrayLike | None = None,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None,
        stop: Sequence[int] | None = None,
    ) -> Tokens:  # fmt: skip
        """Continue prompts.

        Args:
            ids, mask: see ``prefill``.
            temperature, top_k, top_p, seed: see ``Sampling``; greedy by default.
            stop: tokens that end a sequence, by default the model's own. A sequence that ended
                repeats its last token until all have.

        Returns:
            The new tokens [B, N], N <= ``max_new_tokens``.
        """
        new = self.stream(
            ids, max_new_tokens, mask=mask, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, stop=stop,
        )  # fmt: skip
        with self._lock:
            return np.stack(list(new), 1)

    def _check_length(self, tokens: int) -> None:
        longest = self.sidecar.longest_text
        if longest is not None and tokens > longest:
            raise EngineError(
                f"a text of {tokens} tokens: the model knows positions for {longest} only"
            )
