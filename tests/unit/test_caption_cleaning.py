"""The rules that clean tags and captions, one by one and together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.caption_cleaning import CAPTION_RULES, clean_caption, clean_tags


@pytest.mark.parametrize(
    ("tags", "clean"),
    [
        ("long_hair, ^_^, hair_bow", "long hair, ^_^, hair bow"),
        ("cat, rating:safe, dog", "cat"),
        ("cat,_rating:s", "cat"),
        ("rating:safe, cat", "rating:safe, cat"),  # the first tag has no ", " before it
        ("1girl, long hair, short hair", "1girl, long hair, short hair"),  # one person: both may be right
        ("2girls, long hair, short hair, hat", "2girls, hat"),
        ("multiple boys, long hair, hat", "multiple boys, long hair, hat"),
        ("2girls, bob cut, hime cut", "2girls"),
        ("2girls, red eyes, blue eyes, closed mouth", "2girls, closed mouth"),
        ("2girls, red eyes, half-closed eyes", "2girls"),
        ("2girls, light blue eyes, red eyes", "2girls, light blue eyes, red eyes"),  # two words are no such tag
        ("2girls, long sleeves, sleeveless", "2girls"),
        ("2girls, ponytail, side braid, double bun, single side bun, two side up, ahoge", "2girls"),
        ("2girls, ponytail", "2girls, ponytail"),
        ("2girls, red hair, blonde hair", "2girls"),
        ("2girls, long hair, red hair", "2girls, long hair, red hair"),  # a length is no colour
        ("2girls, long hair, red hair, blue hair", "2girls, long hair"),
        ("2girls, long hair, short hair, red hair, blue hair", "2girls"),
        ("shirt, white shirt", "white shirt"),
        ("white shirt, shirt, red shirt", "white shirt, red shirt"),
        ("hair ornament, flower hair ornament", "flower hair ornament"),
        ("blue dress, long blue dress", "blue dress, long blue dress"),  # only tags of one word give way
        ("shirt, shirt", "shirt, shirt"),
        ("", ""),
    ],
)
def test_tags(tags, clean):
    assert clean_tags(tags) == clean


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("anime anime anime girl", "girl"),
        ("a young woman", "a girl"),
        ("two young women and a lady", "two girls and a girl"),
        ("a cartoon female with people", "a girl with girls"),
        ("a cartoon image of a person", "an image of a girl"),
        ("an anime cartoon image", "an image"),
        ("a cartoon anime drawing", "a drawing"),
        ("a woman girl girl", "a girl"),
        ("a cat on a sofa", "a cat on a sofa"),
        ("female" * 20_000, "girl" * 20_000),
    ],
)
def test_captions(caption, clean):
    assert clean_caption(caption) == clean


@pytest.mark.parametrize(("words", "replacement"), CAPTION_RULES)
def test_every_rule_of_captions_has_an_effect(words, replacement):
    cleaned = clean_caption(f"x {words}x")
    assert words not in cleaned and cleaned != f"x {words}x"


WORDS = ["long hair", "short hair", "red_hair", "blue hair", "2girls", "1boy", "boys", "shirt", "white shirt", "hair",
         "bob cut", "red eyes", "^_^", "rating:s", "", "eyes", "double bun", "bun", "_", "sleeveless"]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS) | st.text("a_^, -", max_size=6), max_size=9).map(", ".join))
def test_cleaning_tags_twice_changes_nothing_more(tags):
    assert clean_tags(clean_tags(tags)) == clean_tags(tags)


@given(st.lists(st.sampled_from(WORDS), max_size=9))
def test_tags_are_only_taken_away_and_keep_their_order(tags):
    rest = iter(", ".join(tags).replace("red_hair", "red hair").replace(", _", ",  ").split(", "))
    kept = [tag for tag in clean_tags(", ".join(tags)).split(", ") if tag.strip()]
    assert all(tag in rest for tag in kept)


@given(st.lists(st.sampled_from([words for rule in CAPTION_RULES for words in rule] + ["a", "an", ","])).map(" ".join))
def test_cleaning_captions_ends_and_what_is_left_comes_to_rest(caption):
    once = clean_caption(caption)
    again = once
    for _ in range(len(caption) + 1):
        again, before = clean_caption(again), again
        assert len(again) <= len(before)
    assert clean_caption(again) == again
    assert not any(words in once for words in ("woman", "women", "lady", "female", "people", "person", "girl girl"))


def test_cleaning_captions_twice_may_change_more():
    assert clean_caption("a cartoon person") == "a cartoon girl"
    assert clean_caption("a cartoon girl") == "a girl"
