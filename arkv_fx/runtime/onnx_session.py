"""``OnnxSession``: text from an exported folder with ONNX Runtime and numpy, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arkv_fx.errors import EngineError
from arkv_fx.runtime.manifest import Sidecar, read_sidecar
from arkv_fx.runtime.sampling import Sampling
from arkv_fx.runtime.shared import open_graph
from arkv_fx.runtime.tensors import empty, from_numpy, to_numpy

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


class OnnxSession:
    """One batch of sequences of an exported model.

    Threads may share a session: a call waits until another's is done. A stream that another call
    broke into says so instead of going on over the other's sequences. Sessions of one folder share
    its weights, and run side by side.

    Args:
        folder: what ``arkv_fx.export(..., target="onnx")`` wrote. Graphs that were rewritten since
            run under a warning until they are signed, see ``sign``.
        threads: of ONNX Runtime; 0 for its own choice.

    Raises:
        EngineError: if the folder is damaged or ONNX Runtime cannot run it.
    """

    def __init__(self, folder: str | PathLike[str], *, threads: int = 0) -> None:
        if not isinstance(folder, str | PathLike):
            raise EngineError(f"folder={folder!r}: give a path")
        if type(threads) is not int or threads < 0:
            raise EngineError(f"threads={threads!r}: must be a whole number >= 0")
        self.sidecar: Sidecar = read_sidecar(Path(folder))
        self.batch = self.sidecar.batch
        self._runtime = _onnxruntime()
        self._prefill = self._open("prefill", threads)
        self._decode = self._open("decode", threads)
        self._outputs = ["logits", *(t.output for t in self.sidecar.tensors)]
        self._lock = RLock()
        self.reset()

    def reset(self) -> None:
        """Forget the sequences."""
        with self._lock:
            self._state = [empty(self._runtime, t) for t in self.sidecar.tensors]
            self._next = np.zeros(self.batch, np.int64)
            self._hold = object()  # whose sequences these are: another one for every call

    @property
    def nbytes(self) -> int:
        """Bytes of the state: codes, scales, scores, positions and all."""
        return sum(t.nbytes for t in self.sidecar.tensors)

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of the state by its input names; bfloat16 and float8 are held as their bytes."""
        return {
            t.input: to_numpy(value)
            for t, value in zip(self.sidecar.tensors, self._state, strict=True)
        }

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
        seen = self._array("tokens", tokens)
        if seen.shape != (self.batch,) or seen.min() < 0:
            raise EngineError(
                f"tokens={tokens!r}: give the number of tokens seen for each of {self.batch} "
                "sequences"
            )
        found = [from_numpy(self._runtime, state.get(t.input), t) for t in self.sidecar.tensors]
        with self._lock:
            self._state, self._hold = found, object()
            self._next = seen

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
        tokens = self._checked(ids)
        seen = np.ones_like(tokens) if mask is None else self._array("mask", mask)
        if seen.shape != tokens.shape or not np.isin(seen, (0, 1)).all():
            raise EngineError(f"mask {seen.shape}: give zeros and ones like the ids {tokens.shape}")
        if (np.diff(seen, axis=1) < 0).any() or not seen[:, -1].all():
            raise EngineError("mask: padding stands on the left, and no sequence is empty")
        self._check_length(tokens.shape[1])
        if not self.sidecar.padding and not seen.all():
            raise EngineError("mask: this model takes no padding; give equally long prompts")
        if tokens.shape[1] < self.sidecar.least_prompt:
            with self._lock:
                self.reset()
                return [self.step(column) for column in tokens.T][-1]
        positions = np.maximum(seen.cumsum(1) - 1, 0)
        given = {"input_ids": tokens, "attention_mask": seen, "position_ids": positions}
        wanted = self.sidecar.content["graphs"]["prefill"]["inputs"]
        with self._lock:
            self.reset()
            logits = self._run(self._prefill, {name: given[name] for name in wanted}, {})
            self._next = seen.sum(1)
        return logits

    def step(self, ids: ArrayLike) -> Logits:
        """Go on with one token for each sequence.

        Args:
            ids: [B] or [B, 1] integers.

        Returns:
            Logits [B, vocabulary].
        """
        tokens = self._array("ids", ids)
        tokens = self._checked(tokens[:, None] if tokens.ndim == 1 else tokens)
        if tokens.shape[1] != 1:
            raise EngineError(f"a step takes one token for each sequence, not {tokens.shape[1]}")
        with self._lock:
            self._check_length(int(self._next.max()) + 1)
            state = {t.input: x for t, x in zip(self.sidecar.tensors, self._state, strict=True)}
            given = {"input_ids": tokens, "position_ids": self._next[:, None]}
            logits = self._run(self._decode, given, state)
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
        ends = self._array("stop", self.sidecar.eos if stop is None else stop).reshape(-1)
        return self._stream(self._checked(ids), mask, max_new_tokens, sampling, ends)

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

    def _array(self, name: str, given: ArrayLike) -> Tokens:
        """Whole numbers of any shape.

        Raises:
            EngineError: for anything else.
        """
        try:
            found = np.asarray(given)
        except ValueError:
            raise EngineError(f"{name}: give integers in rows of one length") from None
        if found.size and found.dtype.kind not in "iub":
            raise EngineError(f"{name} are {found.dtype}; give integers")
        return found.astype(np.int64)

    def _checked(self, ids: ArrayLike) -> Tokens:
        tokens = self._array("ids", ids)
        if tokens.ndim != 2 or tokens.shape[0] != self.batch or tokens.shape[1] < 1:
            raise EngineError(
                f"ids {tokens.shape}: these graphs take [{self.batch}, tokens]; export with "
                "another batch for more sequences"
            )
        if tokens.min() < 0 or tokens.max() >= self.sidecar.vocabulary:
            raise EngineError(f"ids must be in 0..{self.sidecar.vocabulary - 1}")
        return tokens

    def _check_length(self, tokens: int) -> None:
        longest = self.sidecar.longest_text
        if longest is not None and tokens > longest:
            raise EngineError(
                f"a text of {tokens} tokens: the model knows positions for {longest} only"
            )

    def _run(self, session: Any, given: dict[str, NDArray[Any]], state: dict[str, Any]) -> Logits:
        value = self._runtime.OrtValue.ortvalue_from_numpy
        feeds = {name: value(np.ascontiguousarray(x)) for name, x in given.items()}
        logits, *new = session.run_with_ort_values(self._outputs, {**feeds, **state})
        for info, tensor in zip(self.sidecar.tensors, new, strict=True):
            if info.input.endswith(".bad") and tensor.numpy().any():
                raise EngineError(
                    f"{info.output}: keys or values hold NaN or infinity; look at the model's "
                    "dtype. These sequences are spoilt: call reset()"
                )
        self._state = new
        found: Logits = logits.numpy()[:, -1].astype(np.float32)
        return found

    def _open(self, name: str, threads: int) -> Any:
        inputs = self.sidecar.content["graphs"][name]["inputs"]
        return open_graph(self._runtime, self.sidecar.graph(name), inputs, threads)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "running exported graphs needs ONNX Runtime: pip install onnxruntime"
        ) from error
    return onnxruntime
