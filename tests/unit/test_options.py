"""The option system: one declaration, checked alike on the command line and in TOML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.options import OptionError, OptionParser, add_arguments, build, convert, did_you_mean, opt, options_of


@dataclass(frozen=True)
class Sample:
    """A sample group."""

    switch: bool = opt(False, help="a switch")
    count: int = opt(3, help="a count")
    rate: float | None = opt(help="a rate")
    names: tuple[str, ...] | None = opt(help="names")
    scales: tuple[float, ...] | None = opt(help="scales")
    kind: str = opt("a", choices=["a", "bee"], help="100 % a kind")
    folder: Path | None = opt(help="a folder")
    size: tuple[int, int] | None = opt(
        cli=str, parse=lambda value: tuple(map(int, str(value).split(","))), help="a size"
    )


OPTIONS = {option.name: option for option in options_of(Sample)}


def parse(*argv):
    parser = OptionParser(prog="x")
    add_arguments(parser, Sample)
    return build(Sample, vars(parser.parse_strictly(argv)))


def test_defaults():
    assert parse() == Sample()


def test_command_line_values():
    words = ["--switch", "--count", "5", "--rate", "1", "--names", "a", "b", "--scales", "1", "2.5"]
    got = parse(*words, "--kind", "bee", "--folder", "p/q", "--size", "3,4")
    assert got == Sample(True, 5, 1.0, ("a", "b"), (1.0, 2.5), "bee", Path("p/q"), (3, 4))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cuont", "5"], ["--cuont", "did you mean --count?"]),
        (["--count", "five"], ["--count", "'five'", "a whole number"]),
        (["--kind", "be"], ["--kind", "'be'"]),
        (["stray"], ["'stray'"]),
    ],
)
def test_mistakes_are_one_sentence_with_exit_code_2(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("\n") == 1
    assert all(word in message for word in words)


def test_an_abbreviated_flag_is_told(capsys):
    assert parse("--cou", "5", "--rate=-1").count == 5
    assert capsys.readouterr().err == "x: --cou is taken for --count\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("switch", 0, False), ("switch", 1, True), ("count", 4.0, 4), ("rate", 2, 2), ("names", "one", ("one",)),
        ("names", [], ()), ("scales", [1, 2], (1, 2)), ("count", "3", 3), ("count", "4.0", 4),
        ("rate", " 1e-4", 1e-4), ("folder", "x", Path("x")), ("rate", None, None),
    ],
)  # fmt: skip
def test_toml_values(name, value, expected):
    got = convert(OPTIONS[name], value, "file: key")
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("switch", "yes"), ("switch", 2), ("count", 1.5), ("count", True), ("count", "3.5"), ("rate", "1x"),
     ("rate", "nan"), ("rate", "1_0e999"), ("kind", "c"),
     ("names", [1]), ("folder", 3), ("size", "wide"), ("rate", [1.0])],
)  # fmt: skip
def test_wrong_toml_values_name_key_and_value(name, value):
    with pytest.raises(OptionError, match="file: key"):
        convert(OPTIONS[name], value, "file: key")


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_any_value_converts_or_is_refused_in_words(value):
    for option in OPTIONS.values():
        try:
            convert(option, value, "key")
        except OptionError as error:
            assert "\n" not in str(error).replace(repr(value), "")


@pytest.mark.parametrize(
    ("word", "name"),
    [("epochs", "max_train_epochs"), ("--lr", "--learning_rate"), ("batchsize", "batch_size"), ("x", "")],
)
def test_nearest_names(word, name):
    known = ["max_train_epochs", "learning_rate", "--learning_rate", "batch_size"]
    assert did_you_mean(word, known) == (f"did you mean {name}?" if name else "")
