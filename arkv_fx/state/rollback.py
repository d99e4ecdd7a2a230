"""The last tokens of a sequence taken back, in all layers or in none."""

from __future__ import annotations

from arkv_fx.errors import CacheError
from arkv_fx.state.session import Session
from arkv_fx.state.unwind import holds_all, unwind


def take_back(session: Session, tokens: int) -> None:
    """Let a session forget its last ``tokens``.

    From the journal if it reaches as far, else where nothing has been rounded or lost.

    Raises:
        CacheError: saying how many could be taken back.
    """
    journal, states = session.journal, list(session.layers.values())
    written = [journal.known(state.tensors) if journal else 0 for state in states]
    if journal is not None and all(n >= tokens for n in written):
        for state in states:
            journal.of(state.tensors).take_back(tokens)
    elif all(holds_all(state) for state in states):
        for state in states:
            unwind(state, tokens)
        session.journal = journal and journal.twin()
    else:
        raise CacheError(
            f"{tokens} tokens cannot be taken back, {min(written, default=0)} could: what left "
            "the window has been quantized or evicted. A cache keeps what it takes for its last "
            "tokens, and a second copy of itself for it, after cache.activate_past_recording() (of "
            "a call with logits_to_keep=N for the last N - 1); copy.deepcopy(cache) keeps a state "
            "to go back to"
        )
    for plain in session.plain.values():
        plain.take_back(tokens)
    session.tokens -= tokens
    if session.mask is not None:
        session.mask = session.mask[:, : session.mask.shape[1] - tokens]
