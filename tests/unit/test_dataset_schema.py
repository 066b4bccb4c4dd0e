"""The whole schema of dataset files: every key at every level it may stand at, and the kinds of datasets."""

import json
import logging
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.config import load_configs
from library.data.dataset_file import DATASET_KEYS, FOLDER_ONLY_KEYS, INHERITED_KEYS, KEYS
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CaptionOptions,
    DatasetOptions,
    FolderOptions,
    LoaderOptions,
    MaskOptions,
    SourceOptions,
    ValidationSplitOptions,
)
from library.options import OptionError, convert, options_of
from tests.tiny_data import tiny_images

GROUPS = {
    "bucket": BucketOptions, "caption": CaptionOptions, "augment": AugmentOptions, "loader": LoaderOptions,
    "folder": FolderOptions, "dataset": DatasetOptions, "split": ValidationSplitOptions, "masks": MaskOptions,
}  # fmt: skip
OPTIONS = {
    KEYS.get(option.name, option.name): (name, option)
    for name, group in GROUPS.items()
    for option in options_of(group)
    if KEYS.get(option.name, option.name) in DATASET_KEYS | INHERITED_KEYS
}
PLAIN = {bool: [False, True], int: [1, 2, 3], float: [0.25, 0.5, 0.75, 1], str: ["x", "y", "z"]}
VALUES = {  # keys that don't take just any value of their kind
    "resolution": [512, [512, 640], [768, 512]],
    "min_bucket_reso": [128, 192, 256],
    "max_bucket_reso": [1024, 1088, 2048],
    "bucket_reso_steps": [8, 32, 64],
    "caption_extension": [".txt", ".caption", "text"],
    "face_crop_aug_range": [[1, 2], [2.0, 2.5], [3, 4.5]],
    "custom_attributes": [{}, {"a": 1}, {"b": {"c": [2]}}],
}
# keys without a flag, and the one whose flag has another name, tried below
NO_FLAG = {"class_tokens", "custom_attributes", "network_multiplier", "num_repeats"}


def values_of(key):
    _, option = OPTIONS[key]
    return VALUES.get(key) or list(option.choices or ()) or PLAIN[option.kind]


def load(folder, key, levels, on_command_line):
    """The dataset of a file that has `levels` (subset, dataset, general) and of a command line."""
    subset, dataset, general = ({} if value is ABSENT else {key: value} for value in levels)
    content = {"general": general, "datasets": [{**dataset, "subsets": [{"image_dir": str(folder), **subset}]}]}
    path = folder.parent / "dataset.json"
    path.write_text(json.dumps(content))
    group, option = OPTIONS[key]
    groups = {
        "bucket": BucketOptions((512, 512)), "caption": CaptionOptions(), "augment": AugmentOptions(),
        "loader": LoaderOptions(), "split": ValidationSplitOptions(), "masks": MaskOptions(),
    }  # fmt: skip
    if on_command_line is not ABSENT:
        groups[group] = replace(groups[group], **{option.name: convert(option, on_command_line, "")})
    (config,) = load_configs(SourceOptions(dataset_config=path), *groups.values())
    return config


def used(config, key):
    group, option = OPTIONS[key]
    (subset,) = config.subsets
    owners = {
        "bucket": config.bucket, "caption": subset.caption, "augment": subset.augment, "folder": subset.folder,
        "split": config.split, "masks": getattr(subset, "masks", None),
        "loader": LoaderOptions(config.batch_size), "dataset": DatasetOptions(subset.network_multiplier),
    }  # fmt: skip
    return getattr(owners[group], option.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema") / "images"
    tiny_images(folder, 1)
    return folder


ABSENT = object()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_the_nearest_level_that_has_a_key_wins(folder, data):
    """subset > dataset > general > command line > default; null is as good as nothing."""
    key = data.draw(st.sampled_from(sorted(OPTIONS)))
    values = st.sampled_from([ABSENT, None, *values_of(key)])
    lowest = [] if key in DATASET_KEYS else [data.draw(values)]
    levels = lowest + [data.draw(values), data.draw(values)]
    own_flag = ABSENT if key in NO_FLAG else data.draw(st.sampled_from([ABSENT, *values_of(key)]))
    config = load(folder, key, [ABSENT] * (3 - len(levels)) + levels, own_flag)
    _, option = OPTIONS[key]
    default = (512, 512) if key == "resolution" else option.default
    given_values = [value for value in [*levels, own_flag] if value is not ABSENT and value is not None]
    expected = convert(option, given_values[0], "") if given_values else default
    assert used(config, key) == expected


def test_every_key_that_may_stand_above_is_tried():
    assert set(OPTIONS) == DATASET_KEYS | INHERITED_KEYS
    for key in OPTIONS:
        assert len(values_of(key)) > 1, key
    assert set(OPTIONS) >= NO_FLAG and not FOLDER_ONLY_KEYS & set(OPTIONS)


def test_dataset_repeats_counts_where_the_file_says_nothing(folder):
    path = folder.parent / "repeats.json"
    subsets = [{"image_dir": str(folder)}, {"image_dir": f"{folder}/../images/.", "num_repeats": 2}]
    path.write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": [one]} for one in subsets]}))
    groups = (BucketOptions(), CaptionOptions(), AugmentOptions(), LoaderOptions())
    configs = load_configs(SourceOptions(dataset_config=path, dataset_repeats=5), *groups)
    assert [config.subsets[0].folder.num_repeats for config in configs] == [5, 2]


# ---------------------------------------------------------------------------------------------- kinds


@pytest.fixture
def metadata(folder):
    (folder.parent / "meta.json").write_text(json.dumps({"image_000": {"caption": "x"}}))
    return {"image_dir": str(folder), "metadata_file": str(folder.parent / "meta.json")}


def load_content(folder, content, **source):
    path = folder.parent / "kinds.json"
    path.write_text(json.dumps(content))
    groups = (BucketOptions((64, 64)), CaptionOptions(), AugmentOptions(), LoaderOptions())
    return load_configs(SourceOptions(dataset_config=path, **source), *groups)


def test_kinds_may_differ_between_datasets_but_not_within_one(folder, metadata):
    plain = {"image_dir": str(folder)}
    kinds = load_content(folder, {"datasets": [{"subsets": [metadata]}, {"subsets": [plain]}]})
    assert [config.is_metadata for config in kinds] == [True, False]
    with pytest.raises(OptionError, match=r"^datasets\[1\].subsets\[1\].metadata_file: stands beside a subset without"):
        load_content(folder, {"datasets": [{"subsets": [plain]}, {"subsets": [plain, metadata]}]})


@pytest.mark.parametrize(
    ("key", "value"), [("caption_extension", ".txt"), ("class_tokens", "a"), ("is_reg", False), ("cache_info", True)]
)
def test_keys_of_folders_are_refused_in_a_dataset_of_metadata(folder, metadata, key, value):
    with pytest.raises(OptionError, match=rf"^datasets\[0\].subsets\[0\].{key}: is not for a dataset of metadata"):
        load_content(folder, {"datasets": [{"subsets": [{**metadata, key: value}]}]})
    if key == "is_reg":
        return
    with pytest.raises(OptionError, match=rf"^datasets\[0\].{key}: is not for a dataset of metadata"):
        load_content(folder, {"datasets": [{key: value, "subsets": [metadata]}]})
    assert load_content(folder, {"general": {key: value}, "datasets": [{"subsets": [metadata]}]})


def test_a_metadata_file_without_entries_is_passed_over(folder, metadata, caplog):
    (folder.parent / "empty.json").write_text("{}")
    empty = {"metadata_file": str(folder.parent / "empty.json")}
    with caplog.at_level(logging.INFO):
        (config,) = load_content(folder, {"datasets": [{"subsets": [empty, metadata]}]})
    assert len(config.subsets) == 1 and "datasets[0].subsets[0]: ignored, " in caplog.text
    with pytest.raises(OptionError, match="names no folder of images; add .* or with metadata_file"):
        load_content(folder, {"datasets": [{"subsets": [empty]}]})


def test_custom_attributes_are_kept_and_said_to_change_nothing(folder, caplog):
    content = {"datasets": [{"subsets": [{"image_dir": str(folder), "custom_attributes": {"a": [1]}}]}]}
    with caplog.at_level(logging.INFO):
        (config,) = load_content(folder, content)
    assert config.subsets[0].folder.custom_attributes == {"a": [1]}
    assert caplog.text.count("custom_attributes are kept") == 1


def test_flags_beside_in_json(folder, metadata, caplog):
    groups = (BucketOptions((64, 64)), CaptionOptions(), AugmentOptions(), LoaderOptions(3))
    source = SourceOptions(str(folder), "nowhere", in_json=metadata["metadata_file"], dataset_repeats=4)
    with caplog.at_level(logging.INFO):
        (config,) = load_configs(source, *groups)
    assert "--reg_data_dir ignored: --in_json names the images" in caplog.text
    (subset,) = config.subsets
    assert (subset.folder.num_repeats, config.batch_size, subset.is_metadata) == (4, 3, True)
    assert subset.image_dir == folder and subset.name == "meta.json" and not config.from_file
    for changed, sentence in (
        (replace(source, in_json="nowhere.json"), "^--in_json: 'nowhere.json' is no file"),
        (replace(source, train_data_dir="nowhere"), "^--train_data_dir: 'nowhere' is not a folder"),
    ):
        with pytest.raises(OptionError, match=sentence):
            load_configs(changed, *groups)
    (folder.parent / "empty.json").write_text("{}")
    with pytest.raises(OptionError, match="^--in_json: .* has no entries"):
        load_configs(replace(source, in_json=str(folder.parent / "empty.json")), *groups)


def test_repeats_of_class_folders_stand_in_their_names(tmp_path, caplog):
    tiny_images(tmp_path / "train" / "2_cat", 1)
    tiny_images(tmp_path / "plain", 1)
    groups = (BucketOptions((64, 64)), CaptionOptions(), AugmentOptions(), LoaderOptions())
    (config,) = load_configs(SourceOptions(str(tmp_path / "train"), dataset_repeats=7), *groups)
    assert config.subsets[0].folder.num_repeats == 2 and "--dataset_repeats has no effect" in caplog.text
    (config,) = load_configs(SourceOptions(str(tmp_path / "plain"), dataset_repeats=7), *groups)
    assert config.subsets[0].folder.num_repeats == 7
    with pytest.raises(OptionError, match="^--dataset_repeats: 0 is no number of showings"):
        SourceOptions(dataset_repeats=0)
