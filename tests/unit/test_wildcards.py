"""{a|b|c} in captions."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.text.wildcards import expand_wildcards


def results(text, tries=80):
    return {expand_wildcards(text, random.Random(seed)) for seed in range(tries)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {red|green|blue} cat", {"a red cat", "a green cat", "a blue cat"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{{a|b} x|c}", {"{a|b} x|c}"}),
        ("{a|b {c|d} e|f}", {"a", "b c e", "b d e", "f"}),
        ("{ {a|b}|c}", {" a", " b", "c"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{{{a|b}}}", {"{a}", "{b}"}),
        ("{a|{{b}}}", {"a", "{b}"}),
        ("{|a}", {"", "a"}),
        ("{only}", {"only"}),
        ("{}", {"{}"}),
        ("a|b, {c", {"a|b, {c"}),
        ("{a|{b|c} d", {"{a|b d", "{a|c d"}),
        ("a} b|c", {"a} b|c"}),
        ("}}", {"}"}),
    ],
)
def test_what_a_caption_can_become(text, expected):
    assert results(text) == expected


def test_alternatives_are_equally_likely_and_groups_draw_each_for_itself():
    drawn = [expand_wildcards("{a|b|b2|b3} {c|d}", random.Random(seed)) for seed in range(2000)]
    assert 420 < sum(text.startswith("a") for text in drawn) < 580
    assert 420 < sum(text == "b c" or text == "b d" for text in drawn) < 580
    assert 900 < sum(text.endswith("c") for text in drawn) < 1100


@given(st.text(alphabet="{}|ab ", max_size=60), st.integers(0, 9))
def test_any_text_has_an_answer_and_it_is_always_the_same(text, seed):
    first = expand_wildcards(text, random.Random(seed))
    assert first == expand_wildcards(text, random.Random(seed))
    assert len(first) <= len(text)
    letters = iter(text)
    assert all(letter in letters for letter in first), "only leaves out, in order"


@given(st.text(max_size=60), st.integers(0, 9))
def test_doubled_braces_are_text(text, seed):
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert expand_wildcards(escaped, random.Random(seed)) == text


@given(st.text(alphabet=st.characters(blacklist_characters="{}"), max_size=60))
def test_a_text_without_braces_stays_and_draws_nothing(text):
    draw = random.Random(1)
    assert expand_wildcards(text, draw) == text
    assert draw.random() == random.Random(1).random()


def test_groups_nest_as_deep_as_they_like():
    deep = 20_000
    assert expand_wildcards("{x" * deep + "}" * deep, random.Random(0)) == "x" * deep
    unclosed = "{a|" * deep
    assert expand_wildcards(unclosed, random.Random(0)) == unclosed
    assert expand_wildcards(unclosed + "{b}", random.Random(0)) == unclosed + "b"
