"""`arkv view`: the page of a tier map."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from arkv_fx.evaluation.pages.render import render
from arkv_fx.evaluation.pages.token_texts import pieces
from arkv_fx.evaluation.tier_map import LOWEST, OCTAVE, State, TierMap

NAMES = {
    "window": "Window and sinks", "original": "Original", "quantized": "Quantized",
    "whole": "Not compressed", "outside": "Outside the window", "evicted": "Evicted",
}  # fmt: skip
MEANINGS = {
    "window": "the newest tokens and the first ones, always held exactly",
    "original": "the first tier, which the best ranked tokens keep",
    "quantized": "the second tier, for tokens that lost their place in the first",
    "whole": "a layer whose attention was not rewritten keeps all tokens",
    "outside": "a layer with a sliding window no longer looks at it",
    "evicted": "held nowhere in this head",
}


def tier_page(
    found: TierMap,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    prompt: int,
    said: Sequence[str],
) -> str:
    """One HTML page, with scripts and styles in it.

    Args:
        ids: all tokens, the last of which is in no cache; the first ``prompt`` were given.
        said: sentences about the run.

    Raises:
        EvaluationError: if a package is missing.
    """
    data = {
        "prompt": prompt,
        "tokens": pieces(tokenizer, ids),
        "states": [
            {"role": s.role, "name": _name(s), "meaning": MEANINGS[s.role]} for s in found.states
        ],
        "mixes": found.mixes,
        "lengths": found.lengths,
        "octave": OCTAVE,
        "lowest": LOWEST,
        "layers": [
            {
                "layer": each.layer,
                "heads": each.heads,
                "mixes": each.mixes.packed(),
                "scores": each.scores.packed(),
            }
            for each in found.layers
        ],
    }
    return render(
        "tiers.html",
        title="arkv_fx: where each token is kept",
        said=said,
        states=data["states"],
        layers=[each.layer for each in found.layers],
        last=len(found.lengths) - 1,
        data=data,
    )


def _name(state: State) -> str:
    return f"{NAMES[state.role]}: {state.format}" if state.format else NAMES[state.role]
