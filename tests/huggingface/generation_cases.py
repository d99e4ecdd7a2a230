"""Everything that ``generate()`` can be asked: one function a case, each a call or two of a model.

After the tests that transformers has for it. A case returns tensors by name, the same for a model
and for the same model transformed. All of them have one or two rows, so that they share graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    MaxLengthCriteria,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from arkv_fx.huggingface.model_caches import is_encoder_decoder
from arkv_fx.zoo.configs import tiny_model
from arkv_fx.zoo.drive import HIDDEN, SOURCE, Encoded

NEW, PROMPT = 6, 12
Result = dict[str, Tensor]


def inputs(model: PreTrainedModel, rows: int = 2, *, padded: bool = False) -> dict[str, Any]:
    """Arguments of ``generate()``: token ids, for an encoder-decoder its encoder's answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 128, (rows, PROMPT), generator=generator)
    if is_encoder_decoder(model):
        source = torch.randn(rows, SOURCE, HIDDEN, generator=generator)
        mask = torch.ones(rows, SOURCE, dtype=torch.long)
        mask[1:, : 5 * padded] = 0
        encoded = Encoded(last_hidden_state=source, attention_mask=mask)
        return {
            "encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": ids[:, :4],
        }  # fmt: skip
    mask = torch.ones_like(ids)
    mask[1:, : 5 * padded] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: PreTrainedModel, **options: Any) -> Any:
    """transformers' own: Whisper's is a loop around it, over pieces of sound."""
    return GenerationMixin.generate(model, **options)  # type: ignore[arg-type]


def answer(model: PreTrainedModel, given: dict[str, Any], **options: Any) -> Result:
    """Sequences, and what else the call answers for each step."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    torch.manual_seed(0)
    out = generate(model, **given, **settings | options)
    found = {"sequences": out.sequences}
    for name in ("scores", "logits"):
        if (steps := out.get(name)) is not None:
            found[name] = torch.stack(steps, 1)
    for name in ("sequences_scores", "beam_indices"):
        if out.get(name) is not None:
            found[name] = out[name]
    for name in ("hidden_states", "decoder_hidden_states"):
        if out.get(name) is not None:
            found[name] = torch.cat([step[-1] for step in out[name]], 1)
    return found


def _plainly(**options: Any) -> Callable[[PreTrainedModel], Result]:
    return lambda model: answer(model, inputs(model), **options)


def _one(**options: Any) -> Callable[[PreTrainedModel], Result]:
    return lambda model: answer(model, inputs(model, 1), **options)


def in_chunks(model: PreTrainedModel) -> Result:
    """The prompt a few tokens at a time.

    ``generate()`` cuts an encoder's mask as well, which goes unseen only where it hides nothing.
    """
    given = inputs(model, padded=not is_encoder_decoder(model))
    return answer(model, given, prefill_chunk_size=3, output_logits=True)


def bare_tokens(model: PreTrainedModel) -> Result:
    """Without a dict, the tokens are all there is."""
    return {"sequences": generate(model, **inputs(model), max_new_tokens=NEW, do_sample=False)}


def early_end(model: PreTrainedModel) -> Result:
    """Rows that stop at different times."""
    tokens = answer(model, inputs(model))["sequences"]
    stop = int(tokens[0, -NEW + 2])
    return answer(model, inputs(model), eos_token_id=stop, output_scores=True)


def criteria(model: PreTrainedModel) -> Result:
    """Somebody's own reason to stop."""
    stop = StoppingCriteriaList([MaxLengthCriteria(PROMPT + 2)])
    return answer(model, inputs(model), stopping_criteria=stop)


def streamed(model: PreTrainedModel) -> Result:
    """Tokens as they come."""

    class Keeps(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.tokens.append(value.flatten())

        def end(self) -> None:
            pass

    streamer = Keeps()
    answer(model, inputs(model, 1), streamer=streamer)
    return {"tokens": torch.cat(streamer.tokens)}


def embeddings(model: PreTrainedModel) -> Result:
    """From embeddings in place of ids."""
    given = inputs(model)
    ids = given.pop("input_ids")
    embed: Any = model.get_input_embeddings()
    return answer(model, {**given, "inputs_embeds": embed(ids)}, output_logits=True)


def embeddings_and_ids(model: PreTrainedModel) -> Result:
    """From embeddings, with ids for what looks at them."""
    given = inputs(model)
    embed: Any = model.get_input_embeddings()
    given["inputs_embeds"] = embed(given["input_ids"])
    return answer(model, given, output_logits=True)


def _more(given: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """The same with these ids, nothing in front of them padded anew."""
    if "decoder_input_ids" in given:
        return {**given, "decoder_input_ids": tokens}
    behind = torch.ones_like(tokens[:, given["input_ids"].shape[1] :])
    mask = torch.cat([given["attention_mask"], behind], 1)
    return {"input_ids": tokens, "attention_mask": mask}


def _goes_on(model: PreTrainedModel, padded: bool, cache: Any = None, new: int = 0) -> Result:
    given = inputs(model, padded=padded)
    begun: Any = {"past_key_values": cache} if cache is not None else {}
    first = generate(
        model, **given, **begun, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    tokens = torch.cat([first.sequences, torch.full((2, new), 7)], 1)
    return answer(
        model, _more(given, tokens), past_key_values=first.past_key_values, output_logits=True
    )


def continued(model: PreTrainedModel) -> Result:
    """From the cache of a call before."""
    return _goes_on(model, padded=False)


def continued_padded(model: PreTrainedModel) -> Result:
    """The same where a row is padded."""
    return _goes_on(model, padded=True)


def second_turn(model: PreTrainedModel) -> Result:
    """With new tokens behind the answer."""
    return _goes_on(model, padded=False, new=5)


def empty_cache(model: PreTrainedModel) -> Result:
    """An empty cache of transformers' own, which a chat loop makes."""
    cache: Any = DynamicCache(config=model.config)
    if is_encoder_decoder(model):
        cache = EncoderDecoderCache(cache, DynamicCache())
    return _goes_on(model, padded=False, cache=cache)


def copied_cache(model: PreTrainedModel) -> Result:
    """Two texts with one beginning, whose cache is copied."""
    given = inputs(model)
    first = generate(
        model, **given, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    found: Result = {}
    for token in (5, 6):
        tokens = torch.cat([first.sequences, torch.full((2, 2), token)], 1)
        cache = copy.deepcopy(first.past_key_values)
        out = answer(model, _more(given, tokens), past_key_values=cache, output_logits=True)
        found |= {f"{name}{token}": value for name, value in out.items()}
    return found


def assisted(model: PreTrainedModel) -> Result:
    """A smaller model proposes."""
    helper = tiny_model(model.zoo_name, seed=1)  # type: ignore[arg-type]
    return answer(model, inputs(model, 1), assistant_model=helper)


def static_given(model: PreTrainedModel) -> Result:
    """A static cache of somebody's own."""
    cache = StaticCache(config=model.config, max_cache_len=64)
    return answer(model, inputs(model), past_key_values=cache)


CASES: dict[str, Callable[[PreTrainedModel], Result]] = {
    "greedy": _plainly(output_scores=True, output_logits=True),
    "bare tokens": bare_tokens,
    "hidden states": _plainly(output_hidden_states=True),
    "sample": _plainly(do_sample=True, top_k=20, top_p=0.9, output_scores=True),
    "sample, two answers": _one(do_sample=True, num_return_sequences=2, temperature=1.5),
    "beams": _one(num_beams=2, output_scores=True),
    "beams, two answers": _one(num_beams=2, num_return_sequences=2, length_penalty=2.0),
    "beams, sampled": _one(num_beams=2, do_sample=True, output_scores=True),
    "processors": _plainly(
        repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[3, 4]], min_new_tokens=4,
        output_scores=True,
    ),
    "guidance": _one(guidance_scale=1.5, output_scores=True),
    "padded": lambda model: answer(model, inputs(model, padded=True), output_logits=True),
    "padded beams": lambda model: answer(
        model, {k: v[1:] if isinstance(v, Tensor) else v for k, v in inputs(model).items()},
        num_beams=2,
    ),
    "no cache": _plainly(use_cache=False, output_logits=True),
    "dynamic by name": _plainly(cache_implementation="dynamic"),
    "prompt in chunks": in_chunks,
    "one token": _plainly(max_new_tokens=1, output_logits=True),
    "all logits": _plainly(logits_to_keep=0, output_logits=True),
    "early end": early_end,
    "criteria": criteria,
    "streamed": streamed,
    "embeddings": embeddings,
    "embeddings and ids": embeddings_and_ids,
    "continued": continued,
    "continued, padded": continued_padded,
    "second turn": second_turn,
    "empty cache": empty_cache,
    "copied cache": copied_cache,
    "assisted": assisted,
    "prompt lookup": _one(prompt_lookup_num_tokens=2),
}  # fmt: skip
"""What must come out as without a transform."""

CROPS = ("assisted", "prompt lookup")  # these take tokens back

REFUSED: dict[str, Callable[[PreTrainedModel], Result]] = {
    "static": _plainly(cache_implementation="static"),
    "offloaded": _plainly(cache_implementation="offloaded"),
    "static cache given": static_given,
}
"""What is refused by name: each asks for another cache than ours."""
