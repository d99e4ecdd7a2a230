#!/usr/bin/env bash
# transformers 5.23.0, generate(prefill_chunk_size=N) of an encoder-decoder (here T5) that goes on from
# a decoder prompt.
#
# Guess: the decoder's prompt comes in chunks of N; the encoder has run before, and its padding mask,
# the argument attention_mask, says throughout which of its tokens are padding.
# Behaviour: the chunked prefill cuts attention_mask to the prompt's tokens so far. In a model of one
# stack that is the prompt's mask; here it is the encoder's, which cross-attention needs whole. Padding
# behind the text: what is left of the mask is all ones, so it is dropped, and the prompt attends to
# padding without a word. Padding in front: an error about two sizes.
#
# Seen (logits of the first new token, chunks of 5 against none):
#   no padding: differ by less than 1e-5 True
#   padding behind: differ by more than 1e-2 True
#   padding in front: RuntimeError
# It fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 2>/dev/null
cat >"$work/look.py" <<'PY'
import torch
from transformers import T5Config, T5ForConditionalGeneration

torch.manual_seed(0)
sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
text = torch.randint(2, 64, (2, 20))
begun = torch.randint(2, 64, (2, 9))  # what the decoder goes on from
ones = torch.ones_like(text)
behind, front = ones.clone(), ones.clone()
behind[1, 10:] = 0
front[1, :10] = 0


def logits(mask, **options):
    asked = {"decoder_input_ids": begun, "max_new_tokens": 1, "do_sample": False, **options}
    out = model.generate(
        text, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **asked
    )
    return out.logits[0]


def difference(mask):
    whole = logits(mask)
    return float((logits(mask, prefill_chunk_size=5) - whole).abs().max() / whole.abs().max())


none, right = difference(ones) < 1e-5, difference(behind) > 1e-2
print("no padding: differ by less than 1e-5", none)
print("padding behind: differ by more than 1e-2", right, difference(behind))
try:
    difference(front)
    left = "runs"
except RuntimeError as error:
    left = type(error).__name__
print("padding in front:", left)
assert none and right and left == "RuntimeError", "the encoder's mask is treated otherwise now"
PY
"$work/venv/bin/python" "$work/look.py" 2>/dev/null
