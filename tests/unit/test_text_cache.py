"""Encoded captions in memory and on disk: what is encoded, what is trusted, what a batch gets."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from library.data.options import AugmentOptions, CaptionOptions
from library.data.text_cache_check import check_text_cacheable
from library.data.text_cache_files import text_file_names
from library.data.text_cache_options import TextCacheOptions
from library.data.text_variations import versions_of
from library.options import OptionError
from library.text.states import TextStates
from tests.tiny_data import tiny_images
from tests.tiny_runs import assert_equal, batches, build

PLAIN = CaptionOptions(caption_extension=".txt")
LOOSE = CaptionOptions(caption_extension=".txt", shuffle_caption=True, caption_dropout_rate=0.3)
TAGS = ["one, two, three, four", "five, six, seven, eight", "nine, ten, eleven, twelve"]


class Encoder:
    """Stands for two text encoders: states and pooled text follow from the letters; counts what it is asked for."""

    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        self.scale, self.dtype = scale, dtype
        self.captions: list[str] = []

    def __call__(self, captions) -> TextStates:
        self.captions += captions
        codes = torch.tensor([[float(ord(letter)) for letter in caption[:20].ljust(20)] for caption in captions])
        states = (codes[:, :5, None] * torch.ones(3) * self.scale, codes[:, :5, None] * torch.ones(4) + 1)
        return TextStates(tuple(part.to(self.dtype) for part in states), codes.to(self.dtype))


def data_of(folder, caption=PLAIN, captions=TAGS):
    if not folder.exists():
        tiny_images(folder / "2_disc", 6, [(64, 64)], captions)
    return build(folder, caption=caption, augment=AugmentOptions())


def cached(data, encoder=None, encoders="these", is_checked=True, **options):
    encoder = encoder or Encoder()
    data.cache_texts(encoder, encoders, TextCacheOptions(True, **options), is_checked=is_checked)
    return encoder


def on_disk(data, **settings):
    return cached(data, cache_text_encoder_outputs_to_disk=True, **settings)


def asked(encoder: Encoder) -> set[str]:
    return set(encoder.captions) - {""}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*_te_outputs.npz"))


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("disk", [False, True])
def test_batches_hold_encoded_captions(tmp_path, disk):
    data = data_of(tmp_path / "a")
    encoder = cached(data, cache_text_encoder_outputs_to_disk=disk)
    assert asked(encoder) == set(TAGS), "equal captions are encoded once"
    for batch in batches(data, epochs=1).values():
        expected = Encoder()(batch.captions)
        assert batch.token_ids == () and batch.token_weights is None
        assert all(map(torch.equal, batch.text_states, expected.by_encoder))
        assert torch.equal(batch.pooled_BP, expected.pooled_BP)


def test_memory_and_disk_and_workers_give_the_same(tmp_path):
    settings = {"text_variations": 4}
    first, second = data_of(tmp_path / "a", LOOSE), data_of(tmp_path / "a", LOOSE)
    cached(first, Encoder(dtype=torch.bfloat16), **settings)
    on_disk(second, encoder=Encoder(dtype=torch.bfloat16), **settings)
    ours, theirs = batches(first), batches(second, workers=2)
    assert next(iter(ours.values())).text_states[0].dtype is torch.bfloat16
    for position, batch in ours.items():
        assert_equal(batch, theirs[position])


def test_versions_of_captions(tmp_path):
    """All versions are drawn, the empty caption about as often as asked for, and a draw can be repeated."""
    data = data_of(tmp_path / "a", LOOSE)
    encoder = cached(data, text_variations=5)
    options = LOOSE
    expected = {version for caption in TAGS for version in versions_of(caption, options, 5)}
    assert asked(encoder) == expected and len(expected) > len(TAGS)
    drawn = [caption for batch in batches(data, epochs=40).values() for caption in batch.captions]
    assert set(drawn) == expected | {""}
    assert 0.2 < drawn.count("") / len(drawn) < 0.4
    again = data_of(tmp_path / "a", LOOSE)
    cached(again, text_variations=5)
    assert [c for batch in batches(again, epochs=40).values() for c in batch.captions] == drawn


def test_dropping_every_n_epochs(tmp_path):
    caption = CaptionOptions(caption_extension=".txt", caption_dropout_every_n_epochs=2)
    data = data_of(tmp_path / "a", caption)
    assert asked(cached(data, text_variations=3)) == set(TAGS)
    for position, batch in batches(data, epochs=2).items():
        assert all((caption == "") == (position.epoch == 2) for caption in batch.captions)


def test_prefix_and_suffix_are_encoded(tmp_path):
    caption = CaptionOptions(caption_extension=".txt", caption_prefix="photo:", caption_suffix="(end)")
    assert asked(cached(data_of(tmp_path / "a", caption))) == {f"photo: {text} (end)" for text in TAGS}


# ---------------------------------------------------------------------------------------------- files


def test_files_of_the_trade(tmp_path):
    """Names, shapes and types of the arrays."""
    data = data_of(tmp_path / "a")
    on_disk(data)
    assert [path.name for path in files(tmp_path)] == [f"image_{index:03d}_te_outputs.npz" for index in range(6)]
    arrays = np.load(files(tmp_path)[0])
    found = {name: (arrays[name].shape, arrays[name].dtype.name) for name in arrays.files if name != "fingerprint"}
    assert found == {
        "hidden_state1": ((5, 3), "float32"), "hidden_state2": ((5, 4), "float32"), "pool2": ((20,), "float32"),
    }  # fmt: skip


def test_valid_files_are_not_made_again(tmp_path):
    on_disk(data_of(tmp_path / "a"))
    before = [path.stat().st_mtime_ns for path in files(tmp_path)]
    data = data_of(tmp_path / "a")
    assert asked(on_disk(data)) == set()
    assert [path.stat().st_mtime_ns for path in files(tmp_path)] == before
    assert len(batches(data, epochs=1)) == 6


def spoil(path: Path, **changes) -> None:
    arrays = {**np.load(path), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


SPOILT = {
    "of other captions": lambda path: (path.parent / "image_000.txt").write_text("quite another"),
    "unreadable": truncate,
    "not finite": lambda path: spoil(path, pool2=np.full(20, np.nan, np.float32)),
    "of another size": lambda path: spoil(path, hidden_state2=np.zeros((7, 4), np.float32)),
    "of older code": lambda path: spoil(
        path, fingerprint=np.array(json.dumps({**json.loads(str(np.load(path)["fingerprint"])), "code": 0}))
    ),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("reason", SPOILT)
def test_stale_files_are_made_again(tmp_path, caplog, reason):
    on_disk(data_of(tmp_path / "a"))
    SPOILT[reason](files(tmp_path)[0])
    data = data_of(tmp_path / "a")
    with caplog.at_level(logging.INFO):
        encoder = on_disk(data)
    assert len(asked(encoder)) == 1
    assert (f"1 {reason}" in caplog.text) or reason == "missing"
    for batch in batches(data, epochs=1).values():
        assert all(map(torch.equal, batch.text_states, Encoder()(batch.captions).by_encoder))


def test_other_encoders_make_everything_anew(tmp_path):
    on_disk(data_of(tmp_path / "a"))
    assert asked(on_disk(data_of(tmp_path / "a"), encoders="others")) == set(TAGS)


def test_what_is_no_cache_is_never_overwritten(tmp_path):
    data = data_of(tmp_path / "a")
    mine = tmp_path / "a" / "2_disc" / "image_000_te_outputs.npz"
    mine.write_text("my notes")
    with pytest.raises(OptionError, match="would be overwritten"):
        on_disk(data)
    assert mine.read_text() == "my notes"


def test_a_file_rewritten_by_another_run(tmp_path):
    data = data_of(tmp_path / "a")
    on_disk(data)
    on_disk(data_of(tmp_path / "a"), encoders="others")
    with pytest.raises(OptionError, match="another run has rewritten"):
        batches(data, epochs=1)


def test_skip_cache_check(tmp_path):
    on_disk(data_of(tmp_path / "a"))
    files(tmp_path)[0].unlink()
    data = data_of(tmp_path / "a")
    assert asked(on_disk(data, is_checked=False)) == {TAGS[0]}


def test_processes_share_the_work(tmp_path):
    data, encoders = data_of(tmp_path / "a"), [Encoder(), Encoder()]
    for index, encoder in enumerate(encoders):
        options = TextCacheOptions(cache_text_encoder_outputs_to_disk=True)
        data.cache_texts(encoder, "these", options, process_index=index, num_processes=2)
    assert len(files(tmp_path)) == 6 and all(map(asked, encoders))
    assert asked(on_disk(data_of(tmp_path / "a"))) == set()


def test_no_two_images_or_captions_share_a_file():
    one, other = ("a dog",), ("a cat",)
    images = [("x/a.png", one), ("x/a.jpg", one), ("x/b.png", one), ("x/c.png", one), ("x/c.png", other)]
    names = text_file_names([*images, images[0]])
    assert names[:3] == ["x/a.png_te_outputs.npz", "x/a.jpg_te_outputs.npz", "x/b_te_outputs.npz"]
    assert len(set(names[:5])) == 5 and names[5] == names[0]


# ---------------------------------------------------------------------------------------------- files of others


def foreign(folder: Path, encoder: Encoder, noise: float = 0.0) -> None:
    """What another program would write for the captions as they are."""
    for image in folder.rglob("image_???.*g"):
        states = encoder([image.with_suffix(".txt").read_text()])
        first, second = (part[0].numpy() for part in states.by_encoder)
        pooled = states.pooled_BP[0].numpy()
        path = image.parent / f"{image.stem}_te_outputs.npz"
        np.savez(path, hidden_state1=first, hidden_state2=second, pool2=pooled * (1 + noise))


def test_files_of_another_program_are_used(tmp_path, caplog):
    data = data_of(tmp_path / "a")
    foreign(tmp_path / "a", Encoder(), noise=0.001)
    with caplog.at_level(logging.INFO):
        encoder = on_disk(data)
    assert len(asked(encoder)) <= 2, "a look at some of them, no more"
    assert "6 cache files of another program used" in caplog.text
    (batch, *_) = batches(data, epochs=1).values()
    assert torch.allclose(batch.pooled_BP, Encoder()(batch.captions).pooled_BP * 1.001)


def test_files_of_another_program_by_other_encoders_are_not(tmp_path, caplog):
    data = data_of(tmp_path / "a")
    foreign(tmp_path / "a", Encoder(), noise=0.5)
    with caplog.at_level(logging.INFO):
        assert asked(on_disk(data)) == set(TAGS)
    assert "6 made with other text encoders" in caplog.text


@pytest.mark.parametrize("how", ["newer caption", "prefix"])
def test_files_of_another_program_that_may_be_of_other_captions(tmp_path, how):
    data_of(tmp_path / "a")
    foreign(tmp_path / "a", Encoder())
    caption = PLAIN
    if how == "prefix":
        caption = CaptionOptions(caption_extension=".txt", caption_prefix="photo:")
    else:
        for text in (tmp_path / "a").rglob("*.txt"):
            os.utime(text, (2e9, 2e9))
    assert len(asked(on_disk(data_of(tmp_path / "a", caption)))) == len(TAGS)


# ---------------------------------------------------------------------------------------------- what can't be cached


@pytest.mark.parametrize(
    "changes",
    [
        {"shuffle_caption": True}, {"caption_tag_dropout_rate": 0.1}, {"enable_wildcard": True},
    ],
)  # fmt: skip
def test_captions_that_vary_need_versions(tmp_path, changes):
    (name,) = changes
    data = data_of(tmp_path / "a", CaptionOptions(caption_extension=".txt", **changes))
    configs = [dataset.config for dataset in data.datasets]
    with pytest.raises(OptionError, match=f"contradicts {name} of .*add --text_variations"):
        check_text_cacheable(configs, TextCacheOptions(True))
    check_text_cacheable(configs, TextCacheOptions(True, text_variations=3))
    assert check_text_cacheable(configs, TextCacheOptions()) == []


@pytest.mark.parametrize("changes", [{"caption_dropout_rate": 0.4}, {"caption_dropout_every_n_epochs": 2}])
@pytest.mark.parametrize("is_on_disk", [False, True])
def test_whole_caption_dropout_needs_no_versions(tmp_path, changes, is_on_disk):
    """The very draws that are dropped without a cache are with one."""
    caption = CaptionOptions(caption_extension=".txt", **changes)
    data = data_of(tmp_path / "a", caption)
    assert check_text_cacheable([data.datasets[0].config], TextCacheOptions(True)) == []
    dropped = [batch.captions for batch in batches(data, epochs=4).values()]
    encoder = on_disk(data) if is_on_disk else cached(data)
    found = list(batches(data, epochs=4).values())
    assert [batch.captions for batch in found] == dropped
    assert {text == "" for captions in dropped for text in captions} == {True, False}
    for batch in found:
        assert torch.equal(batch.pooled_BP, encoder(batch.captions).pooled_BP)


def test_captions_that_grow_can_never_be_cached(tmp_path):
    data = data_of(tmp_path / "a", CaptionOptions(caption_extension=".txt", token_warmup_step=5))
    with pytest.raises(OptionError, match="token_warmup_step"):
        check_text_cacheable([data.datasets[0].config], TextCacheOptions(True, text_variations=3))


def test_states_that_are_not_finite(tmp_path):
    with pytest.raises(OptionError, match="no finite numbers for"):
        cached(data_of(tmp_path / "a"), Encoder(scale=float("inf")))


def test_settings_without_effect(tmp_path):
    assert "no effect without" in TextCacheOptions(text_variations=3).notes()[0]
    data = data_of(tmp_path / "a")
    (note,) = check_text_cacheable([data.datasets[0].config], TextCacheOptions(True, text_variations=3))
    assert "one version" in note
