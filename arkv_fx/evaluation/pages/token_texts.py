"""The text of each token, as it stands in the whole: some need others to be characters."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST = 8
"""No character takes more tokens: what is none by then is bytes that are none."""


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, special tokens included.

    Tokens that are a character together give it to the first of them; the others have "".
    """
    out = [""] * len(ids)
    begin = done = (
        0  # tokens from ``begin`` on are decoded, the texts of those before ``done`` known
    )
    for index in range(len(ids)):
        before = _decode(tokenizer, ids[begin:done])
        now = _decode(tokenizer, ids[begin : index + 1])
        last = index + 1 == len(ids)
        if now.endswith(UNFINISHED) and not last and index + 1 - done < LONGEST:
            continue
        # With the token before it a word keeps the space in front of it.
        out[done] = now.removeprefix(before)
        begin, done = done, index + 1
    return out


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
