"""The texts: readable, plain and long enough for a 4k prefill and its continuation."""

import pytest

from arkv_fx import texts
from arkv_fx.errors import UnknownOptionError


@pytest.mark.parametrize("name", texts.names())
def test_text_is_plain_and_long(name: str) -> None:
    text = texts.read(name)
    assert 24_000 < len(text.encode()) < 31_000
    assert len(text.split()) > 4_400
    assert max(map(len, text.splitlines())) < 80
    assert text == text.strip() + "\n"
    assert all(character == "\n" or character.isprintable() for character in text)


def test_there_are_four_texts() -> None:
    assert len(texts.names()) == 4


@pytest.mark.parametrize("name", ["hamlet", "", "README", "../texts/esther"])
def test_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownOptionError, match=", ".join(texts.names())):
        texts.read(name)
