"""A tiny random model with a byte tokenizer, as a folder that `models.load` reads."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from arkv_fx.models import random_model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, no special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_)


def save(folder: Path, arch: str = "llama") -> Path:
    """Write model and tokenizer; returns the folder."""
    random_model(arch, vocab_size=256).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
