"""Text as it comes, and what came when."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from arkv_fx.commands.console import out
from arkv_fx.commands.group import STARTED


class Streamed(TextStreamer):
    """Prints words to stdout as they are whole, and notes when the prompt and each token came.

    Args:
        first: called before the first word is printed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, first: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self._first = first

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, T], then a token [1] at a time."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self._first()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print words: to a terminal without control codes, else as they are."""
        end = "\n" if stream_end else ""
        if out.is_terminal:
            out.print(text, end=end, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            out.file.write(text + end)
            out.file.flush()

    def rates(self, prompt: int) -> dict[str, float | None]:
        """Seconds from the start of the process to the first token; tokens per second of a prompt
        of so many tokens, and of the median step (None for a single token).
        """
        spans = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return {
            "first_token_seconds": self.times[1] - STARTED,
            "prefill_tokens_per_second": prompt / spans[0],
            "decode_tokens_per_second": 1 / statistics.median(spans[1:]) if spans[1:] else None,
        }
