"""Class folders: which are used, with which repeats and class, and what is said of the others."""

import logging

import pytest

from library.data.class_folders import parse_folder_name, passed_over_folders
from library.data.config import load_configs
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, LoaderOptions, SourceOptions
from library.options import OptionError
from tests.tiny_data import tiny_images


def load(source, bucket=None):
    groups = (bucket or BucketOptions(resolution=(64, 64)), CaptionOptions(), AugmentOptions(), LoaderOptions())
    return load_configs(source, *groups)


def load_folder(path, reg=None, **groups):
    (config,) = load(SourceOptions(train_data_dir=str(path), reg_data_dir=reg and str(reg)), **groups)
    return config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("20_shs dog", (20, "shs dog")),
        ("3", (3, "")),
        ("dog", (None, "")),
        ("0_x", (0, "x")),
        ("-1_x", (-1, "x")),
        ("1_a_b", (1, "a_b")),
        ("10_a_b c", (10, "a_b c")),
    ],
)
def test_folder_names(name, expected):
    assert parse_folder_name(name) == expected


def test_class_folders_are_sorted_and_others_passed_over(tmp_path, caplog):
    for name in ("9_b", "10_a", "dog", "0_x", "-1_x", "5_empty"):
        (tmp_path / "train" / name).mkdir(parents=True)
        if name != "5_empty":
            tiny_images(tmp_path / "train" / name, 2)
    tiny_images(tmp_path / "train", 1)
    tiny_images(tmp_path / "reg" / "1_person", 1)
    with caplog.at_level(logging.INFO):
        config = load_folder(tmp_path / "train", tmp_path / "reg")
    found = [(s.image_dir.name, s.folder.num_repeats, s.folder.class_tokens, s.folder.is_reg) for s in config.subsets]
    assert found == [("10_a", 10, "a", False), ("9_b", 9, "b", False), ("1_person", 1, "person", True)]
    told = {path.name: why for path, why in passed_over_folders(tmp_path / "train")}
    assert told == {
        "0_x": "2 images, but 0 repeats",
        "-1_x": "2 images, but -1 repeats",
        "dog": "2 images, but the name does not begin with the repeats; rename it, for example to 10_dog",
        "5_empty": "empty",
        "train": "1 image directly in it, but there are class folders",
    }


def test_a_folder_of_images_itself(tmp_path, caplog):
    tiny_images(tmp_path / "10_cat", 3)
    with caplog.at_level(logging.INFO):
        (subset,) = load_folder(tmp_path / "10_cat").subsets
    assert (subset.folder.num_repeats, subset.folder.class_tokens) == (1, None)
    assert "holds 3 images itself" in caplog.text


def test_no_images_shows_what_was_looked_at(tmp_path):
    tiny_images(tmp_path / "dog", 2)
    tiny_images(tmp_path / "0_off", 1)
    tiny_images(tmp_path / "5_deep" / "inner", 4)
    (tmp_path / "7_text").mkdir()
    (tmp_path / "7_text" / "a.txt").write_text("a")
    with pytest.raises(OptionError) as caught:
        load_folder(tmp_path)
    message = str(caught.value)
    assert message.startswith("--train_data_dir: no images found; name class folders <repeats>_<class>, ")
    assert f"looked at:\n  {tmp_path}/: no images directly in it\n" in message
    for line in (
        "dog/: 2 images, but the name does not begin with the repeats; rename it, for example to 10_dog",
        "0_off/: 1 image, but 0 repeats",
        "5_deep/: no images, but 4 in inner/; only one level is looked at",
        "7_text/: 1 file, no image",
    ):
        assert f"\n    {line}\n" in f"{message}\n"


def test_missing_folders_and_settings(tmp_path):
    with pytest.raises(OptionError, match="^--train_data_dir: 'nowhere' is not a folder"):
        load_folder("nowhere")
    with pytest.raises(OptionError, match="^--train_data_dir: no training images given"):
        load(SourceOptions())
    tiny_images(tmp_path, 1)
    with pytest.raises(OptionError, match="^--reg_data_dir: 'nowhere' is not a folder"):
        load_folder(tmp_path, "nowhere")
    with pytest.raises(OptionError, match="^--resolution: is not given"):
        load_folder(tmp_path, bucket=BucketOptions())
