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


def test_tag_frequency():
    assert tag_frequency(["Cat, dog ,,", "cat"]) == {"cat": 2, "dog": 1}


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
    ],
)
def test_values_out_of_range(given):
    with pytest.raises(OptionError, match=f"^--{next(iter(given))}: "):
        CaptionOptions(**given)
