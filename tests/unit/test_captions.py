"""What becomes of a caption: the trade's vectors, and the rules for every caption."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import process_caption, tag_frequency
from library.data.options import CaptionOptions
from library.options import OptionError

STORED = "a,b , c,d,,e"
TEN = ", ".join(f"t{number}" for number in range(10))


def processed(caption, *, seed=0, epoch=1, step=0, max_train_steps=1000, **options):
    draw = random.Random(seed)
    return process_caption(
        caption, CaptionOptions(**options), draw, epoch=epoch, step=step, max_train_steps=max_train_steps
    )


def test_prefix_and_suffix_leave_the_spacing():
    assert processed("a,b , c", caption_prefix="x") == "x a,b , c"
    assert processed("a,b , c", caption_prefix="P,", caption_suffix=", Q") == "P, a,b , c , Q"


def test_prefix_counts_as_a_kept_part():
    results = [
        processed("a,b , c,d", seed=seed, caption_prefix="P,", keep_tokens=1, shuffle_caption=True)
        for seed in range(30)
    ]
    assert all(result.startswith("P, ") and sorted(result[3:].split(", ")) == list("abcd") for result in results)
    assert len(set(results)) > 10


def test_kept_parts_survive_dropout():
    assert processed(STORED, keep_tokens=2, caption_tag_dropout_rate=1.0) == "a, b"
    assert processed(STORED, keep_tokens=2, caption_tag_dropout_rate=1e-12) == "a, b, c, d, , e"


@pytest.mark.parametrize(("step", "count"), [(0, 1), (10, 1), (11, 1), (12, 2), (50, 5), (99, 9), (100, 10)])
def test_warm_up(step, count):
    expected = ", ".join(TEN.split(", ")[:count])
    assert processed(TEN, token_warmup_step=100, step=step) == expected
    assert processed(TEN, token_warmup_step=0.1, step=step) == expected  # a tenth of 1000 steps


def test_warm_up_minimum():
    assert processed(TEN, token_warmup_step=100, token_warmup_min=4) == "t0, t1, t2, t3"


def test_whole_caption_dropout():
    drops = [processed("a", seed=seed, caption_dropout_rate=0.25) == "" for seed in range(400)]
    assert 60 < sum(drops) < 140
    assert processed("a", caption_prefix="p", caption_dropout_rate=1) == ""


def test_dropout_by_epoch_counts_from_one():
    dropped = [epoch for epoch in range(1, 8) if not processed("a", epoch=epoch, caption_dropout_every_n_epochs=3)]
    assert dropped == [3, 6]


TEXTS = st.text(alphabet=st.characters(blacklist_categories=("Cs",)))


@given(TEXTS)
def test_without_options_nothing_changes(caption):
    assert processed(caption) == caption


@given(TEXTS, st.integers(0, 5), st.integers())
def test_shuffling_keeps_every_part_and_the_first_in_place(caption, keep, seed):
    parts = [part.strip() for part in caption.strip().split(",")]
    result = processed(caption, seed=seed, shuffle_caption=True, keep_tokens=keep).split(", ")
    assert result[:keep] == parts[:keep]
    assert sorted(result) == sorted(parts)


@given(
    st.lists(st.text(alphabet="ab ", min_size=1).filter(str.strip), min_size=1), st.floats(1e-9, 1), st.integers(0, 4)
)
def test_tag_dropout_gives_an_ordered_selection(parts, rate, keep):
    stripped = [part.strip() for part in parts]
    result = processed(",".join(parts), caption_tag_dropout_rate=rate, keep_tokens=keep)
    remaining = iter(stripped)
    assert all(part in remaining for part in (result.split(", ") if result else []))
    assert result.split(", ")[: min(keep, len(parts))] == stripped[: min(keep, len(parts))] or keep == 0


# ---------------------------------------------------------------------------------------------- separators, lines


def test_a_separator_of_ones_own_is_kept():
    """The trade joins with a comma whatever the separator was."""
    assert processed("a;b ; c", caption_separator=";", token_warmup_step=1, step=1) == "a; b; c"
    shuffled = {processed("a, b. c. d", seed=seed, caption_separator=".", shuffle_caption=True) for seed in range(60)}
    assert "c. a, b. d" in shuffled and len(shuffled) == 6
    assert processed("a / b", caption_separator=" / ", shuffle_caption=True, seed=1) in ("a / b", "b / a")


DIVIDED = dict(keep_tokens_separator="|||", shuffle_caption=True)


def test_parts_before_the_separator_and_after_a_second_stay():
    results = {processed("x, y ||| a, b,, c ||| z,", seed=seed, **DIVIDED) for seed in range(80)}
    assert all(result.startswith("x, y, ") and result.endswith(", z") for result in results)
    assert {tuple(sorted(result[6:-3].split(", "))) for result in results} == {("a", "b", "c")}
    assert len(results) == 6
    assert processed("x ||| a ||| z ||| w", caption_tag_dropout_rate=1, keep_tokens_separator="|||") == "x, z ||| w"


def test_the_separator_overrides_keep_tokens_where_it_is():
    options = DIVIDED | {"keep_tokens": 3, "caption_tag_dropout_rate": 1.0}
    assert processed("a, b, c, d, e", **options) == "a, b, c"
    assert processed("a ||| b, c, d, e", **options) == "a"


def test_the_separator_is_never_learned():
    """The trade leaves it in captions when nothing is shuffled or dropped."""
    assert processed("a, b||| c", keep_tokens_separator="|||") == "a, b, c"
    assert processed("a,b  c", keep_tokens_separator="|||") == "a,b  c"


def test_warm_up_spares_kept_parts():
    warm_up = {"token_warmup_step": 100, "token_warmup_min": 0}
    assert processed("x, y ||| a, b ||| z", keep_tokens_separator="|||", **warm_up, step=50) == "x, y, a, z"
    assert processed("x, y, a, b", keep_tokens=2, **warm_up, step=0) == "x, y"
    assert processed("x, y, a, b", keep_tokens=2, **warm_up, step=50) == "x, y, a"


def test_parts_joined_by_the_secondary_separator_stay_together():
    options = {"shuffle_caption": True, "secondary_separator": ";;"}
    results = {processed("red hat;;blue hat, sky, sea", seed=seed, **options) for seed in range(80)}
    assert len(results) == 6 and all("red hat,blue hat" in result for result in results)
    assert processed("a;;b", secondary_separator=";;") == "a,b"
    assert processed("a;;b. c", secondary_separator=";;", caption_separator=".") == "a.b. c"
    assert processed("a;;b", secondary_separator=";;", caption_dropout_rate=1) == ""


LINES = "one cat\n\n two {dogs|cats} \nthree"


def test_one_line_is_drawn_and_every_line_has_prefix_and_suffix():
    options = {"enable_wildcard": True, "caption_prefix": "{P|Q}:", "caption_suffix": "!"}
    results = {processed(LINES, seed=seed, **options) for seed in range(200)}
    middles = {"one cat", "two dogs", "two cats", "three"}
    assert results == {f"{letter}: {middle} !" for letter in "PQ" for middle in middles}


def test_without_wildcards_braces_and_lines_stay():
    assert processed(LINES) == LINES
    assert processed("{a|b}", shuffle_caption=True) == "{a|b}"


def test_wildcards_come_before_the_parts():
    results = {
        processed("{x, y|z} ||| a, b", seed=seed, enable_wildcard=True, **DIVIDED).split(", ")[0] for seed in range(40)
    }
    assert results == {"x", "z"}
    assert processed("{a, b|a, b}, c", enable_wildcard=True, keep_tokens=2, caption_tag_dropout_rate=1) == "a, b"


ODD = st.text(alphabet="ab,;|{} \n", max_size=40)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "shuffle_caption": st.booleans(),
        "keep_tokens": st.integers(0, 3),
        "caption_tag_dropout_rate": st.sampled_from([0.0, 0.3, 1.0]),
        "caption_dropout_rate": st.sampled_from([0.0, 0.3]),
        "token_warmup_step": st.sampled_from([0, 0.5, 7, 10.5]),
        "token_warmup_min": st.integers(0, 4),
        "caption_prefix": st.sampled_from(["p,", "{p|q}"]),
        "caption_suffix": st.just(", s"),
        "caption_separator": st.sampled_from([",", ";", " | "]),
        "keep_tokens_separator": st.sampled_from(["||", "|||"]),
        "secondary_separator": st.sampled_from([";;", "ab"]),
        "enable_wildcard": st.booleans(),
    },
)


@given(ODD, OPTIONS, st.integers(0, 5), st.integers(0, 12))
def test_every_combination_is_a_function_of_its_draw(caption, options, seed, step):
    first = processed(caption, seed=seed, step=step, max_train_steps=20, **options)
    assert first == processed(caption, seed=seed, step=step, max_train_steps=20, **options)


PART = st.text(alphabet="abc", min_size=1, max_size=3)
PARTS = st.lists(PART, min_size=1, max_size=5)


@given(PARTS, PARTS, PARTS, st.integers(), st.sampled_from([",", ";", " / ", "."]))
def test_shuffling_between_separators_loses_nothing(first, loose, last, seed, separator):
    glue = separator if separator.endswith(" ") else separator + " "
    caption = "|||".join(separator.join(parts) for parts in (first, loose, last))
    result = processed(caption, seed=seed, caption_separator=separator, **DIVIDED).split(glue)
    assert result[: len(first)] == first and result[-len(last) :] == last
    assert sorted(result[len(first) : -len(last)]) == sorted(loose)


@given(PARTS, PARTS, PARTS, st.integers(), st.floats(1e-9, 1))
def test_dropout_between_separators_only_removes_loose_parts(first, loose, last, seed, rate):
    caption = "|||".join(",".join(parts) for parts in (first, loose, last))
    result = processed(caption, seed=seed, keep_tokens_separator="|||", caption_tag_dropout_rate=rate).split(", ")
    assert result[: len(first)] == first and result[-len(last) :] == last
    remaining = iter(loose)
    assert all(part in remaining for part in result[len(first) : -len(last)])


def test_tag_frequency():
    assert tag_frequency(["Cat, dog ,,", "cat"]) == {"cat": 2, "dog": 1}
    assert tag_frequency(["a, b; c", "c"], ";") == {"a, b": 1, "c": 2}


@pytest.mark.parametrize(
    "given",
    [
        {"caption_dropout_rate": 1.5},
        {"caption_dropout_rate": math.nan},
        {"caption_tag_dropout_rate": math.nan},
        {"keep_tokens": -1},
        {"token_warmup_step": -1},
        {"token_warmup_step": math.nan},
        {"token_warmup_step": math.inf},
        {"caption_separator": ""},
        {"keep_tokens_separator": ","},
        {"secondary_separator": ";", "caption_separator": ";"},
        {"secondary_separator": "||", "keep_tokens_separator": "||"},
    ],
)
def test_values_out_of_range(given):
    with pytest.raises(OptionError, match=f"^--{next(iter(given))}: "):
        CaptionOptions(**given)
