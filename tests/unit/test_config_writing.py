"""What --output_config writes is what --config_file reads, whatever the text."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from library.cli.config_file import read_config_file, write_config_file
from library.options import OptionError, convert, opt, options_of

TEXTS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r\0"), min_size=1)


@dataclass(frozen=True)
class Words:
    """Texts."""

    one: str | None = opt(help="a text")
    many: tuple[str, ...] | None = opt(help="texts")
    number: float = opt(0.0, help="a number")


@dataclass(frozen=True)
class Switch:
    """A switch."""

    on: bool = opt(False, help="a switch")


OPTIONS = {option.name: option for option in options_of(Words)}


@given(TEXTS, st.lists(TEXTS, min_size=1), st.floats(allow_nan=False, allow_infinity=False))
@example("D:\\xl\\data", ["a=\\x41", "\x1b\x7f\u2028"], 1e-05)
@example('"""', ["'", "#"], 0.1)
def test_every_text_comes_back(one, many, number):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        write_config_file(path, {"one": one, "many": many, "number": number}, OPTIONS)
        values, notes = read_config_file(path, OPTIONS)
    assert values.get("one") == one and list(values["many"]) == many and values.get("number", 0.0) == number
    assert not notes


def test_half_a_character_is_named(tmp_path):
    with pytest.raises(OptionError, match="--one: .* holds a character that no text file can"):
        write_config_file(tmp_path / "run.toml", {"one": "\ud83d"}, OPTIONS)


def test_what_no_name_can_hold_and_words_for_switches():
    text, switch = OPTIONS["one"], options_of(Switch)[0]
    with pytest.raises(OptionError, match="--one: 'a.x00b' holds a character that no name can"):
        convert(text, "a\0b", "--one")
    assert convert(switch, "true", "on") is True and convert(switch, "False", "on") is False
    with pytest.raises(OptionError, match="'yes' is not true or false"):
        convert(switch, "yes", "on")
