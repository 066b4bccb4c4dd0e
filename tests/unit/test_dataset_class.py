"""Datasets that somebody else wrote: from items to batches, for any number of processes and workers."""

import random
import sys

import numpy as np
import pytest
import torch

from library.data.batch import Position
from library.data.config import check_dataset_class
from library.data.dataset_class import ForeignData, make_dataset
from library.data.options import CacheOptions, SourceOptions
from library.options import OptionError
from tests.tiny_runs import assert_equal, letters, run_facts


class Items:
    """Five items of one or two images; item i is filled with i / 10."""

    def __init__(self, **changes):
        self.changes = changes
        self.told = []

    def __len__(self):
        return 5

    def set_current_epoch(self, epoch):
        self.told.append(("epoch", epoch))

    def set_current_step(self, step):
        self.told.append(("step", step))

    def set_max_train_steps(self, steps):
        self.told.append(("most", steps))

    def __getitem__(self, index):
        count = 1 + index % 2
        item = {
            "images": np.full((count, 3, 32, 64), index / 10, np.float32),
            "captions": [f"item {index}, {random.random():.6f}, {np.random.rand():.6f}"] * count,
        }
        return {name: value for name, value in (item | self.changes).items() if value is not None}


def batches(items=None, *, start=None, workers=0, **changes):
    data = ForeignData("my.Items", items or Items(), seed=1)
    return dict(data.loader(start=start or Position(1, 0), workers=workers, **run_facts(**changes)))


def items_in(found):
    return [int(name.split("[")[1].rstrip("]")) for batch in found for name in batch.image_names[:1]]


def test_an_item_becomes_a_batch():
    found = batches(epochs=1)
    assert sorted(items_in(found.values())) == [0, 1, 2, 3, 4]
    for batch, index in zip(found.values(), items_in(found.values()), strict=True):
        assert batch.size == 1 + index % 2 and batch.denominator == batch.size
        assert batch.images_BCHW.dtype == torch.float32 and (batch.images_BCHW == index / 10).all()
        assert batch.noise_BCHW.shape == batch.posterior_noise_BCHW.shape == (batch.size, 4, 4, 8)
        assert torch.equal(batch.token_ids[0], letters(batch.captions)[0][0])
        assert batch.loss_weight_B.tolist() == [1.0] * batch.size
        assert batch.original_hw_B2.tolist() == batch.target_hw_B2.tolist() == [[32, 64]] * batch.size
        assert batch.crop_yx_B2.tolist() == [[0, 0]] * batch.size


def test_what_an_item_may_say():
    ids = torch.arange(77)[None]
    said = {
        "images": None, "latents": torch.ones(1, 4, 5, 7), "captions": None, "input_ids": ids, "loss_weights": [0.5],
        "original_sizes_hw": [(100, 90)], "crop_top_lefts": torch.tensor([[1, 2]]), "target_sizes_hw": [[40, 56]],
    }  # fmt: skip
    batch = next(iter(batches(Items(**said)).values()))
    assert batch.images_BCHW is None and batch.latents_BCHW.shape == batch.noise_BCHW.shape == (1, 4, 5, 7)
    assert batch.token_ids[0].shape == (1, 1, 77) and batch.captions == ("",) and batch.posterior_noise_BCHW is None
    assert (batch.original_hw_B2.tolist(), batch.crop_yx_B2.tolist()) == ([[100, 90]], [[1, 2]])
    assert batch.target_hw_B2.tolist() == [[40, 56]] and batch.loss_weight_B.tolist() == [0.5]
    windows = Items(**{**said, "input_ids": torch.zeros(1, 3, 77), "target_sizes_hw": None})
    batch = next(iter(batches(windows).values()))
    assert batch.token_ids[0].shape == (1, 3, 77) and batch.token_ids[0].dtype == torch.int64
    assert batch.target_hw_B2.tolist() == [[40, 56]]


def test_workers_and_the_start_change_nothing_not_even_of_unseeded_draws():
    whole = batches(epochs=3)
    assert len({batch.captions for batch in whole.values()}) == 15
    for other in (batches(epochs=3, workers=2), batches(epochs=3, start=Position(2, 3))):
        for position, batch in other.items():
            assert_equal(batch, whole[position])
    assert list(batches(epochs=3, start=Position(2, 3))) == list(whole)[8:]
    assert [items_in(list(whole.values())[first : first + 5]) for first in (0, 5)] != [[0, 1, 2, 3, 4]] * 2


def test_processes_share_the_items():
    """The mean over processes of sum(weight x value) / denominator is the mean over the items' own means."""
    alone, first, second = (
        batches(epochs=1, process_index=index, num_processes=count) for index, count in ((0, 1), (0, 2), (1, 2))
    )
    assert len(first) == len(second) == 3
    pairs = list(zip(first.values(), second.values(), strict=True))
    real = [batch for pair in pairs for batch in pair if batch.loss_weight_B.any()]
    assert items_in(real) == items_in(alone.values())
    for pair in pairs:
        values = [batch.images_BCHW.mean((1, 2, 3)) for batch in pair]
        means = [value.mean() for value, batch in zip(values, pair, strict=True) if batch.loss_weight_B.any()]
        shares = [
            (value * batch.loss_weight_B).sum() / batch.denominator for value, batch in zip(values, pair, strict=True)
        ]
        assert torch.allclose(sum(shares) / 2, sum(means) / len(means))


def test_the_class_is_told_where_the_run_is():
    items = Items()
    batches(items, epochs=2, accumulation=2, max_train_steps=6)
    assert items.told[0] == ("most", 6)
    assert [value for name, value in items.told if name == "epoch"] == [1, 2]
    assert [value for name, value in items.told if name == "step"] == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": None}, "it has neither images nor latents"),
        ({"images": "pixels"}, "its images are no tensor"),
        ({"images": np.zeros((3, 32, 64))}, "its images are not (B, 3, H, W)"),
        ({"images": None, "latents": np.zeros((1, 3, 32, 64))}, "its latents are not (B, 4, H, W)"),
        ({"images": np.zeros((1, 3, 30, 64))}, "its images are 64x30; sides have to be multiples of 8"),
        ({"captions": None}, "its captions are no list of texts, and it has no input_ids"),
        ({"captions": "text"}, "images and 4 captions"),
        ({"captions": ["a", "b", "c"]}, "images and 3 captions"),
        ({"input_ids": torch.zeros(9, 77)}, "its input_ids are not (B, 77) or (B, N, 77)"),
        ({"loss_weights": [1.0, 1.0, 1.0]}, "and its loss_weights are not as many numbers"),
        ({"loss_weights": ["a", "b"]}, "its loss_weights are no tensor"),
        ({"loss_weights": [float("nan")] * 2}, "and its loss_weights are not as many numbers"),
        ({"crop_top_lefts": [(0, 0, 0)]}, "its crop_top_lefts are not (B, 2)"),
        ({"crop_top_lefts": 5}, "its crop_top_lefts are not (B, 2)"),
        ({"target_sizes_hw": [("a", "b")]}, "its target_sizes_hw are no tensor"),
        ({"images": np.full((1, 3, 8, 8), 200, np.uint8)}, "its images go from 200 to 200, and not from -1 to 1"),
        ({"images": np.full((1, 3, 8, 8), np.nan)}, "its images or latents are not finite numbers"),
        ({"images": None, "latents": np.full((1, 4, 8, 8), np.inf)}, "its images or latents are not finite numbers"),
        ({"images": np.zeros((1, 3, 0, 64))}, "its images are 64x0; sides have to be multiples of 8"),
    ],
)
def test_items_that_can_not_be_used_are_named(changes, problem):
    with pytest.raises(OptionError) as caught:
        batches(Items(**changes))
    assert str(caught.value).startswith("--dataset_class: item ") and "my.Items: " in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize("ids", [torch.full((1, 77), 49408), torch.full((1, 77), -1), torch.full((1, 77), 0.5)])
def test_ids_beyond_the_vocabulary_are_refused(ids):
    one = Items(images=np.zeros((1, 3, 8, 8)), captions=None, input_ids=ids)
    with pytest.raises(OptionError, match="its input_ids are not all whole numbers from 0 to 49407"):
        batches(one)


class Unhappy(Items):
    @property
    def num_train_images(self):
        raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Unhappy, "num_train_images of my.Items: RuntimeError: boom"),
        (type("", (Items,), {"num_reg_images": "many"}), "num_reg_images of my.Items: ValueError"),
        (type("", (Items,), {"tag_frequency": {("a", "b"): 1}}), "tag_frequency of my.Items: TypeError"),
        (type("", (Items,), {"set_current_epoch": lambda self, epoch: 1 / 0}), "set_current_epoch of my.Items: Zero"),
        (type("", (Items,), {"__getitem__": lambda self, index: sys.exit(3)}), "of my.Items: SystemExit: 3"),
    ],
)
def test_whatever_the_class_raises_is_one_sentence(kind, sentence):
    with pytest.raises(OptionError) as caught:
        batches(kind())
    assert sentence in str(caught.value) and str(caught.value).endswith("; mend the class")


def test_a_class_that_does_not_count_its_images(caplog):
    quiet = type("", (Items,), {"num_train_images": None})()
    data = ForeignData("my.Items", quiet, seed=1)
    assert (data.num_train_images, data.num_reg_images) == (5, 0)
    assert data.metadata() == {"ss_num_train_images": 5, "ss_num_reg_images": 0}


@pytest.mark.parametrize(
    ("name", "problem"),
    [("__main__.Items", "names this program itself"), ("nowhere_at_all.Items", "there is no module nowhere_at_all")],
)
def test_names_that_lead_nowhere(name, problem):
    with pytest.raises(OptionError, match=problem):
        check_dataset_class(SourceOptions(dataset_class=name), CacheOptions())


def test_a_module_that_ends_the_program_is_named(tmp_path, monkeypatch):
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(1)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OptionError, match="ends_at_once.Data can't be imported: 1"):
        make_dataset("ends_at_once.Data", [None], max_token_length=None, resolution=None, debug_dataset=False)


@pytest.mark.parametrize(("result", "problem"), [([1], "is a list and not a dictionary"), (None, "KeyError: 'no'")])
def test_items_that_fail(result, problem):
    class Failing(Items):
        def __getitem__(self, index):
            if result is None:
                raise KeyError("no")
            return result

    with pytest.raises(OptionError, match=problem):
        batches(Failing())
