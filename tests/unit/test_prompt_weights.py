"""The emphasis parser: the trade's vectors, and what holds for every text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.text.prompt_weights import BREAK, DEEPEST, LARGEST_EMPHASIS, parse_prompt_weights

VECTORS = {
    "a (b) c": [("a ", 1), ("b", 1.1), (" c", 1)],
    "a (b:1.3) [c]": [("a ", 1), ("b", 1.3), (" ", 1), ("c", 0.9091)],
    "((a:1.2)b": [("a", 1.32), ("b", 1.1)],
    "x:1.2) y": [("x:1.2) y", 1)],
    r"\(a\)": [("(a)", 1)],
    "[a": [("a", 0.9091)],
    "(a:b)": [("a:b", 1.1)],
    "": [("", 1)],
    "a [b] (c:1.5) d": [("a ", 1), ("b", 0.9091), (" ", 1), ("c", 1.5), (" d", 1)],
    "((x)) (y": [("x", 1.21), (" ", 1), ("y", 1.1)],
    "x) [z": [("x) ", 1), ("z", 0.9091)],
    "a:b (c:0.5": [("a:b ", 1), ("c:0.5", 1.1)],
    "(a:1.2, b)": [("a:1.2, b", 1.1)],
    r"p\(q\) [r:0.3]": [("p(q) ", 1), ("r:0.3", 0.9091)],
    "red BREAK blue": [("red ", 1), BREAK, (" blue", 1)],
    "BREAKfast": [("", 1), BREAK, ("fast", 1)],
    "(a BREAK b:2)": [("a ", 2), BREAK, (" b", 2)],  # the mark itself has no weight
    "(a:-0.5)": [("a", -0.5)],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
    r"a\\b \c": [(r"a\b \c", 1)],
}


@pytest.mark.parametrize("text", VECTORS)
def test_vectors(text):
    assert [(part, round(weight, 4)) for part, weight in parse_prompt_weights(text)] == VECTORS[text]


@given(st.text(alphabet=st.characters(blacklist_characters="()[]\\", blacklist_categories=("Cs",))))
def test_text_without_brackets_keeps_every_letter(text):
    joined = "".join(part for part, weight in parse_prompt_weights(text))
    assert joined == text


@given(st.text(alphabet="ab:1.()[]\\ "))
def test_neighbours_never_share_a_weight_and_escaping_gives_the_text_back(text):
    segments = parse_prompt_weights(text)
    assert all(a[1] != b[1] for a, b in zip(segments, segments[1:], strict=False))
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert parse_prompt_weights(escaped) == [(text, 1.0)]


def test_no_brackets_make_a_number_that_is_none():
    huge = "1" + "0" * 400
    assert parse_prompt_weights(f"((a:{huge}):0)") == [("a", 0.0)]
    assert parse_prompt_weights(f"((a:{huge}):{huge})") == [("a", 1e30)]
    assert parse_prompt_weights(f"((a:0):-{huge})") == [("a", 0.0)]


def test_brackets_without_end_are_read_in_time():
    segments = parse_prompt_weights("(a" * 9000)
    assert "".join(part for part, _ in segments) == "a" * 9000
    assert LARGEST_EMPHASIS < segments[-1][1] < 1e7  # so that prompts are still refused
    assert len(segments) == DEEPEST and segments[0][1] == 1.1
