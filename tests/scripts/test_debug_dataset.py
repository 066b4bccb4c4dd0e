"""--debug_dataset: what the first epoch's samples look like, without training."""

import csv
import json
import webbrowser

import numpy as np
import pytest
from PIL import Image

from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.dataset_class import ForeignData
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, LoaderOptions, SourceOptions
from library.train import debug_dataset
from tests.runs import train_network
from tests.tiny_data import tiny_images
from tests.tiny_runs import run_facts


@pytest.fixture(autouse=True)
def no_screen(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


def look(options, **changes):
    """The table and the sheets of a run with these changes."""
    options = {**options, "debug_dataset": True, **changes}
    assert train_network(**options) == 0
    folder = options["output_dir"] / "net-dataset"
    with (folder / "samples.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, sorted(folder.glob("*.png"))


def test_every_sample_is_in_the_table_and_on_a_sheet(options, tmp_path, caplog):
    folder, reg = tmp_path / "train", tmp_path / "reg"
    tiny_images(folder / "2_disc", 10, captions=["a, b, c", "", "long " * 100])
    tiny_images(reg / "1_thing", 5, captions=[], seed=20)
    changes = {"train_data_dir": folder, "reg_data_dir": reg, "prior_loss_weight": 0.5, "flip_aug": True}
    rows, sheets = look(options, **changes, shuffle_caption=True)
    assert len(rows) == 40 and len(sheets) == 2
    assert sorted(path.name for path in options["output_dir"].iterdir()) == ["net-dataset", "net.log"]
    assert {row["mirrored"] for row in rows} == {"0", "1"}
    of_reg = [row for row in rows if row["regularisation"] == "1"]
    assert len(of_reg) == 20 and {(row["loss_weight"], row["caption"]) for row in of_reg} == {("0.5", "thing")}
    of_train = [row for row in rows if row["regularisation"] == "0"]
    assert {row["repeats"] for row in of_train} == {"2"}
    assert {sorted(row["caption"].split(", ")).__repr__() for row in of_train if row["tokens"] == "5"} == {
        "['a', 'b', 'c']"
    }
    assert {(row["tokens"], row["tokens_cut_off"]) for row in of_train if "long" in row["caption"]} == {("100", "25")}
    batches = {}
    for row in rows:
        batches.setdefault(row["batch"], set()).add((row["width"], row["height"]))
    assert all(len(sizes) == 1 for sizes in batches.values())
    assert "and 20 more" in caplog.text and "picture sheets and a table of 40 samples" in caplog.text
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 1000


def test_the_table_says_what_a_run_trains_on(options, images):
    """Captions and their order are those of the first epoch, with and without cached latents and workers."""
    rows, _ = look(options, shuffle_caption=True, flip_aug=True, train_batch_size=3)
    again, _ = look(
        options, shuffle_caption=True, flip_aug=True, train_batch_size=3, cache_latents=True,
        max_data_loader_n_workers=2,
    )  # fmt: skip
    assert rows == again and len(rows) == 12
    assert [row["place"] for row in rows[:3]] == ["1", "2", "3"]


def test_masks_and_latents_without_images_are_shown(options, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = Image.new("RGBA", (64, 64), "red")
    picture.putalpha(Image.fromarray(np.tile(np.uint8([0, 255]).repeat(32), (64, 1))))
    picture.save(folder / "a.png")
    arrays = {"latents": np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)}
    np.savez(folder / "b.npz", **arrays, original_size=np.array((100, 90)), crop_ltrb=np.zeros(4))
    np.savez(folder / "a.npz", **arrays, original_size=np.array((64, 64)), crop_ltrb=np.zeros(4))
    entries = {name: {"caption": name, "train_resolution": [64, 64]} for name in "ab"}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    changes = {"train_data_dir": folder, "in_json": tmp_path / "meta.json"}
    rows, _ = look(options, **changes)
    assert {(row["caption"], row["original_width"]) for row in rows} == {("a", "64"), ("b", "100")}
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"caption": "a"}}))
    plain, masked = (np.asarray(Image.open(look(options, **changes, alpha_mask=mask)[1][0])) for mask in (False, True))
    rows, columns = np.nonzero((plain != masked).any(axis=2))
    assert len(rows) > 1000 and columns.max() - columns.min() < 110  # the left half of one picture


def test_pictures_are_as_many_and_as_large_as_the_sheets_need(images):
    configs = load_configs(
        SourceOptions(str(images)), BucketOptions((512, 256)), CaptionOptions(), AugmentOptions(), LoaderOptions(5)
    )
    data = TrainingData.build(configs, seed=1, on_bad_image="stop")
    facts = run_facts()
    shown = list(data.first_epoch(num_pictured=7, workers=0, **facts))
    assert [sample.pixels_HWC is not None for sample in shown] == [True] * 7 + [False] * 5
    assert {sample.pixels_HWC.shape for sample in shown[:7]} == {(106, 212, 3)}
    assert {sample.size_wh for sample in shown} == {(512, 256)}
    foreign = ForeignData("my.Class", [{"images": np.zeros((3, 3, 8, 512)), "captions": ["a", "b", "c"]}] * 3, seed=1)
    shown = list(foreign.first_epoch(num_pictured=4, workers=0, **facts))
    assert [sample.pixels_HWC is not None for sample in shown] == [True] * 4 + [False] * 5
    assert shown[0].pixels_HWC.shape == (3, 212, 3)


def test_a_file_in_the_place_of_the_folder_is_named(options, capsys):
    options["output_dir"].mkdir()
    (options["output_dir"] / "net-dataset").write_text("mine")
    assert train_network(**options, debug_dataset=True) == 2
    assert "net-dataset (File exists)" in capsys.readouterr().err


def test_sheets_of_an_earlier_look_go_away(options, tmp_path):
    tiny_images(tmp_path / "many" / "3_x", 10)
    tiny_images(tmp_path / "few" / "1_x", 2)
    assert len(look(options, train_data_dir=tmp_path / "many")[1]) == 2
    assert len(look(options, train_data_dir=tmp_path / "few")[1]) == 1


def test_a_window_opens_where_there_is_a_screen(options, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    look(options)
    assert not opened
    monkeypatch.setenv("DISPLAY", ":0")
    _, sheets = look(options)
    assert opened == [sheets[0].resolve().as_uri()]
    assert debug_dataset.has_screen()


OWN = """
import torch


class Two(torch.utils.data.Dataset):
    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        assert debug_dataset

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"images": torch.zeros(2, 3, 64, 64), "captions": ["a b", "c"], "loss_weights": [1.0, 0.25]}
"""


def test_a_class_of_ones_own(options, tmp_path, monkeypatch):
    (tmp_path / "debugged_class.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows, sheets = look(options, dataset_class="debugged_class.Two", train_data_dir=None)
    assert [(row["batch"], row["caption"], row["tokens"]) for row in rows] == [
        ("1", "a b", "2"), ("1", "c", "1"), ("2", "a b", "2"), ("2", "c", "1"),
    ]  # fmt: skip
    assert {row["loss_weight"] for row in rows} == {"1", "0.25"} and len(sheets) == 1
