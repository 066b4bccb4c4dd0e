"""{a|b} in prompts: every form of a group, its combinations, and what is drawn from a seed."""

from __future__ import annotations

import logging
import random
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from library.generate.dynamic_prompts import MOST_COMBINATIONS, parse_dynamic_prompt
from library.generate.options import PictureOptions, PromptOptions
from library.generate.prompt_line import RawLine
from library.generate.request import GenerationRequest, make_requests
from library.options import OptionError


def combinations(line: str) -> list[str]:
    return list(parse_dynamic_prompt(line, "here").combinations(0))


def possible(line: str, tries: int = 200) -> set[str]:
    prompt = parse_dynamic_prompt(line, "here")
    return {prompt.drawn(random.Random(seed)) for seed in range(tries)}


# as the trade's generator expands them, in this order
ENUMERATED = {
    "{e$$a|b} {E$$c|d}": ["a c", "a d", "b c", "b d"],
    "{E$$2$$a|b|c}": ["a, b", "a, c", "b, c"],
    "{E$$1-2$$ and $$a|b}": ["a", "b", "a and b"],
    "{e$$0-1$$a|b}": ["", "a", "b"],
    "{E$$2-1$$a|b}": ["a", "b", "a, b"],
    "{E$$0-9$$+$$a|b}": ["", "a", "b", "a+b"],
    "{E$$a {E$$1|2}|b}": ["a 1", "a 2", "b"],
    "{E$$a|b} {only}": ["a only", "b only"],
    "{{E$$1|2}}": ["1", "2"],
    r"{E$$\{a\}|b}": ["{a}", "b"],
}


@pytest.mark.parametrize("line", ENUMERATED)
def test_combinations_in_their_order(line: str) -> None:
    assert combinations(line) == ENUMERATED[line]
    assert parse_dynamic_prompt(line, "here").is_enumerated


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a {red|green} cat", {"a red cat", "a green cat"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{a|b {c|d} e}", {"a", "b c e", "b d e"}),
        ("{only}", {"only"}),
        ("{|a}", {"", "a"}),
        ("{}", {""}),
        ("{2$$a|b}", {"a, b", "b, a"}),
        ("{0$$a|b}", {""}),
        ("{1-2$$ + $$a|b}", {"a", "b", "a + b", "b + a"}),
        ("{9$$/$$a|b}", {"a/b", "b/a"}),
        ("{ and $$a|b}", {"a", "b"}),
        (r"\{a|b\} {c\}|d}", {"{a|b} c}", "{a|b} d"}),
        (r"\\{a|b}", {r"\\a", r"\\b"}),
        (r"\(a\) {b}", {r"\(a\) b"}),
        ("a|b, {c", {"a|b, {c"}),
        ("a} b|c", {"a} b|c"}),
        ("{a|{b|c} d", {"{a|b d", "{a|c d"}),
        ("{a --w 64|b --n {x|y}}", {"a --w 64", "b --n x", "b --n y"}),
        ("price {1$|2$}", {"price 1$", "price 2$"}),
    ],
)
def test_what_a_group_can_become(line: str, expected: set[str]) -> None:
    assert possible(line) == expected


def test_a_text_without_groups_is_not_dynamic() -> None:
    for line in ("a cat", "a|b", "{a", "a}", r"\{a|b\}"):
        assert not parse_dynamic_prompt(line, "here").is_dynamic


def test_too_much_is_refused_before_it_is_listed() -> None:
    many = "|".join(map(str, range(60)))
    for line in (f"{{E$$1-30$${many}}}", "{E$$a|b}" * 14, f"{{E$${many}}}" * 900):
        with pytest.raises(OptionError, match=rf"^here: its braces enumerate .*; {MOST_COMBINATIONS} is the limit"):
            parse_dynamic_prompt(line, "here")
    with pytest.raises(OptionError, match="^here: its braces nest deeper than 50"):
        parse_dynamic_prompt("{" * 5000 + "a" + "}" * 5000, "here")


texts = st.text(st.sampled_from("ab{}|$E12- \\,"), max_size=40)


@example(r"\\}", 0)
@given(texts, st.integers(0, 2**32))
def test_any_text_becomes_a_text_that_its_seed_decides(line: str, seed: int) -> None:
    try:
        prompt = parse_dynamic_prompt(line, "here")
    except OptionError:
        return
    drawn = prompt.drawn(random.Random(seed))
    assert drawn == prompt.drawn(random.Random(seed))
    assert set(drawn) <= set(line) | {",", " "}
    if "{" not in line:  # pairs of backslashes stay: they are the weight grammar's
        assert drawn == re.sub(r"\\([\\}])", lambda pair: "}" if pair[1] == "}" else pair[0], line)


@given(texts)
def test_combinations_are_as_many_as_counted(line: str) -> None:
    try:
        prompt = parse_dynamic_prompt(line, "here")
    except OptionError:
        return
    assert len(list(prompt.combinations(0))) == prompt.num_combinations
    assert prompt.is_enumerated or prompt.num_combinations == 1


words = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=5, unique=True)


@given(words, st.integers(0, 6), st.integers(0, 6), st.integers(0, 1000))
def test_a_count_takes_that_many_different_variants(variants: list[str], first: int, last: int, seed: int) -> None:
    line = f"{{{first}-{last}$$;$${'|'.join(variants)}}}"
    taken = [word for word in parse_dynamic_prompt(line, "x").drawn(random.Random(seed)).split(";") if word]
    least, most = (min(count, len(variants)) for count in sorted((first, last)))
    assert least <= len(taken) <= most
    assert len(set(taken)) == len(taken) and set(taken) <= set(variants)


# ---------------------------------------------------------------------------------------------- as requests


def made(line: str, **options: int | bool) -> list[GenerationRequest]:
    return make_requests([RawLine(line)], PromptOptions(prompt=line, **options), PictureOptions())


def test_each_picture_draws_from_its_own_seed() -> None:
    requests = made("a {b|c|d|e}", images_per_prompt=8, seed=3)
    assert len({request.prompt for request in requests}) > 1
    prompt = parse_dynamic_prompt("a {b|c|d|e}", "x")
    assert [r.prompt for r in requests] == [prompt.drawn(random.Random(r.seed)) for r in requests]
    assert {request.raw_prompt for request in requests} == {"a {b|c|d|e}"}
    (again,) = made(f"a {{b|c|d|e}} --d {requests[5].seed}")
    assert again == requests[5]


def test_seeds_of_the_line_decide_and_leave_it() -> None:
    one, two, three = made("a {b|c|d|e|f|g|h} --d 1,2", images_per_prompt=3)
    assert [one.seed, two.seed, three.seed] == [1, 2, 2]
    assert two == three != one
    assert "--d" not in one.prompt


def test_variants_may_hold_options() -> None:
    for request in made("{a --w 64 --n x|b --w 128 --d 5} --h 192", images_per_prompt=16, seed=1):
        assert (request.width, request.negative_prompt) == ((64, "x") if request.prompt == "a" else (128, ""))
        assert request.height == 192
        assert (request.seed == 5) == (request.prompt == "b")


def test_combinations_take_the_place_of_images_per_prompt_and_share_a_seed() -> None:
    requests = made("{E$$a|b} {x|y|z}", images_per_prompt=5, seed=1)
    assert [request.prompt[0] for request in requests] == ["a", "b"]
    assert len({(request.seed, request.prompt[2]) for request in requests}) == 1
    assert [request.seed for request in made("{E$$a|b|c} --d 7,8")] == [7, 8, 8]
    assert [request.seed for request in made("{E$$a|b}", seed=9)] == [9, 9]


def test_a_broken_variant_names_its_line_and_a_good_one_is_read_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OptionError, match="^--prompt: --w 'wide' is not a whole number"):
        made("{a --w wide}")
    with pytest.raises(OptionError, match="^--prompt: --d has no seed outside of braces"):
        made("a cat --d {1|2}")
    with pytest.raises(OptionError, match="^--prompt: --d 'x' is not a seed"):
        made("{a|b} --d x")
    with caplog.at_level(logging.WARNING):
        made("{a|b} --foo 1", images_per_prompt=30)
    assert len(caplog.records) == 2, "one for each of both texts"


def test_global_generators_are_left_alone() -> None:
    state = random.getstate()
    made("{a|b} {E$$c|d}", images_per_prompt=3)
    assert random.getstate() == state
