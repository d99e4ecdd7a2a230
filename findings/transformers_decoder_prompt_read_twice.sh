#!/usr/bin/env bash
# transformers 5.23.0, generate() of an encoder-decoder (here T5) that goes on from a cache which holds
# the beginning of the decoder's text.
#
# Guess: as in a model of one stack, generate(whole text, past_key_values=cache) reads what the cache
# does not hold yet.
# Behaviour: without decoder_attention_mask the whole text is read again, behind what the cache holds,
# without a word; with a mask of ones, which says nothing else, only what is new is read.
#
# Seen (9 of 10 tokens in the cache, 2 to be generated; logits against those without a cache):
#   no mask: the cache holds 20 tokens, differs by more than 1e-2 True
#   a mask of ones: the cache holds 11 tokens, differs by less than 1e-5 True
# It fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 2>/dev/null
cat >"$work/look.py" <<'PY'
import torch
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration

torch.manual_seed(0)
sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
source, begun = torch.randint(2, 64, (1, 20)), torch.randint(2, 64, (1, 10))
begun[0, 0] = 0


@torch.no_grad()
def generate(cache=None, **options):
    out = model.generate(
        source, decoder_input_ids=begun, past_key_values=cache, max_new_tokens=2, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **options,
    )
    return torch.stack(out.logits)


whole = generate()


def goes_on(**options):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        model(input_ids=source, decoder_input_ids=begun[:, :9], past_key_values=cache)
    off = float((generate(cache, **options) - whole).abs().max() / whole.abs().max())
    return cache.get_seq_length(), off


(twice, wrong), (once, right) = goes_on(), goes_on(decoder_attention_mask=torch.ones_like(begun))
print(f"no mask: the cache holds {twice} tokens, differs by more than 1e-2", wrong > 1e-2)
print(f"a mask of ones: the cache holds {once} tokens, differs by less than 1e-5", right < 1e-5)
assert (twice, once) == (20, 11) and wrong > 1e-2 and right < 1e-5, "it reads otherwise now"
PY
"$work/venv/bin/python" "$work/look.py" 2>/dev/null
