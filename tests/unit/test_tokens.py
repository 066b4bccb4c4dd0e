"""CLIP's tokens and the layout of windows."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from library.text.tokens import VOCABULARY, ClipTokenizer

BOS, EOS = 49406, 49407
TEXTS = [
    "a photo of a cat",
    "Hello!!! World's  best, 1girl, (blue:1.3) é ñ 日本語 テスト 12345",
    "don't  can't I'll\n\n x\t__init__ #hash @user ^_^",
    "emoji 😀👍 ﬁ ½ Ⅳ ＦＵＬＬ İstanbul",
    "",
    "a" * 300,
]


def content(count: int) -> list[int]:
    return list(range(1001, 1001 + count))


def test_known_ids():
    assert ClipTokenizer().windows(["a photo of a cat"], 1)[0, 0, :8].tolist() == [
        BOS,
        320,
        1125,
        539,
        320,
        2368,
        EOS,
        EOS,
    ]
    assert ClipTokenizer("zero").windows(["a photo of a cat"], 1)[0, 0, 5:9].tolist() == [2368, EOS, 0, 0]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(text: str):
    reference = CLIPTokenizer.from_pretrained(VOCABULARY)
    assert ClipTokenizer().encode(text) == reference(text, add_special_tokens=False).input_ids


@given(st.text(max_size=40))
def test_any_text_has_ids_of_the_vocabulary(text: str):
    assert all(0 <= token <= EOS for token in ClipTokenizer().encode(text))


def test_exclamation_mark_is_no_padding():
    """Id 0, SD 2.x's padding, is "!" inside a word; a mark that ends one has its own id, as in OpenCLIP."""
    assert ClipTokenizer("zero").encode("large!") == ClipTokenizer("eos").encode("large!") == [3638, 256]


def test_one_window():
    for pad_token, pad in (("eos", EOS), ("zero", 0)):
        tokenizer = ClipTokenizer(pad_token)
        assert tokenizer.layout([], 1) == [[BOS, EOS] + [pad] * 75]
        assert tokenizer.layout(content(3), 1) == [[BOS, *content(3), EOS] + [pad] * 72]
        assert tokenizer.layout(content(75), 1) == tokenizer.layout(content(90), 1) == [[BOS, *content(75), EOS]]


def test_two_windows_of_80_tokens():
    first = [BOS, *content(75), EOS]
    assert ClipTokenizer("eos").layout(content(80), 2) == [first, [BOS, *content(80)[75:], *[EOS] * 71]]
    assert ClipTokenizer("zero").layout(content(80), 2) == [first, [BOS, *content(80)[75:], EOS, *[0] * 70]]


def test_two_windows_where_the_first_is_just_full():
    first, second = ClipTokenizer("zero").layout(content(75), 2)
    assert first == [BOS, *content(75), EOS]
    assert second == [BOS, EOS, *[0] * 75]


def test_two_windows_of_few_tokens():
    first, second = ClipTokenizer("zero").layout(content(5), 2)
    assert first == [BOS, *content(5), EOS, *[0] * 70]
    assert second == [BOS, EOS, *[0] * 75]
    first, second = ClipTokenizer("eos").layout(content(5), 2)
    assert first == [BOS, *content(5), *[EOS] * 71]
    assert second == [BOS, *[EOS] * 76]


def test_three_full_windows():
    for pad_token in ("eos", "zero"):
        windows = ClipTokenizer(pad_token).layout(content(230), 3)
        assert windows == [[BOS, *content(225)[i : i + 75], EOS] for i in (0, 75, 150)]


@pytest.mark.parametrize("pad_token", ["eos", "zero"])
@given(count=st.integers(0, 240), num_windows=st.integers(1, 3))
def test_every_window_is_one(pad_token: str, count: int, num_windows: int):
    tokenizer = ClipTokenizer(pad_token)
    windows = tokenizer.layout(content(count), num_windows)
    assert len(windows) == num_windows
    assert all(len(window) == 77 and window[0] == BOS and EOS in window for window in windows)
    kept = [token for window in windows for token in window if token in range(1001, 2000)]
    assert kept == content(min(count, 75 * num_windows))


def test_batch_of_captions_and_tokens_cut_off():
    tokenizer = ClipTokenizer()
    ids = tokenizer.windows(["cat", "cat " * 160], 2)
    assert ids.shape == (2, 2, 77) and ids.dtype == torch.int64
    assert tokenizer.count_cut_off("cat " * 160, 2) == 10
    assert tokenizer.count_cut_off("cat", 1) == 0


def test_a_worker_gets_a_small_pickle():
    tokenizer = ClipTokenizer("zero")
    tokenizer.encode("warm up")
    data = pickle.dumps(tokenizer)
    assert len(data) < 200
    assert pickle.loads(data).windows(["a cat"], 2).equal(tokenizer.windows(["a cat"], 2))
