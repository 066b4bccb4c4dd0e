"""The ss_* keys about the data: every one of them, for all kinds of datasets."""

import json

import pytest
import toml

from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, LoaderOptions, SourceOptions
from tests.tiny_data import tiny_image, tiny_images

BUCKET = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}


@pytest.fixture
def root(tmp_path):
    tiny_images(tmp_path / "cats", 4, sizes=((64, 64), (96, 48)), captions=["cat, Grass", "cat"])
    tiny_images(tmp_path / "more" / "cats", 1, sizes=((64, 64),), captions=["cat, sky"])
    tiny_images(tmp_path / "animals", 3, sizes=((64, 64),), captions=[])
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate("ab"):
        tiny_image((80, 40), seed=number).save(tmp_path / "pictures" / f"{name}.png")
    entries = {
        "a": {"caption": "a cat", "tags": "cat, red", "train_resolution": [96, 48]},
        "b": {"caption": "another", "train_resolution": [96, 48]},
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    return tmp_path


def loaded(source, *groups):
    groups = groups or (BucketOptions(), CaptionOptions(caption_extension=".txt"), AugmentOptions(), LoaderOptions())
    return TrainingData.build(load_configs(source, *groups), seed=1, on_bad_image="stop")


def parsed(metadata):
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in metadata.items()}


def subset(**changes):
    return {
        "img_count": 1, "num_repeats": 1, "color_aug": False, "flip_aug": False, "random_crop": False,
        "shuffle_caption": False, "keep_tokens": 0, **changes,
    }  # fmt: skip


def folder(name, *, tokens=None, is_reg=False, **changes):
    return subset(image_dir=name, class_tokens=tokens, is_reg=is_reg, **changes)


def test_three_datasets_with_regularisation_and_flips(root):
    content = {
        "general": {"flip_aug": True, "batch_size": 3},
        "datasets": [
            {
                "resolution": 64, **BUCKET,
                "subsets": [
                    {"image_dir": f"{root}/cats/", "num_repeats": 2, "shuffle_caption": True, "keep_tokens": 1},
                    {"image_dir": f"{root}/more/cats", "color_aug": True, "flip_aug": False},
                    {"image_dir": f"{root}/animals", "is_reg": True, "class_tokens": "animal"},
                ],
            },
            {"resolution": [64, 96], "batch_size": 1, "subsets": [{"image_dir": f"{root}/cats", "random_crop": True}]},
            {"subsets": [{"metadata_file": f"{root}/meta.json", "image_dir": f"{root}/pictures", "num_repeats": 5}]},
        ],
    }  # fmt: skip
    (root / "d.toml").write_text(toml.dumps(content))
    data = loaded(SourceOptions(dataset_config=root / "d.toml"))
    found = parsed(data.metadata(num_processes=2, accumulation=4))
    datasets = found.pop("ss_datasets")
    cats = {"cats": {"cat": 5, "grass": 2, "sky": 1}, "animals": {"animal": 3}}
    assert found == {
        "ss_num_train_images": 9 + 4 + 10,
        "ss_num_reg_images": 3,
        "ss_num_validation_images": 0,
        "ss_tag_frequency": {**cats, "meta.json": {"cat": 1, "red": 1}},
        "ss_dataset_dirs": {
            "cats": {"n_repeats": 2, "img_count": 4},
            "cats (2)": {"n_repeats": 1, "img_count": 1},
            "cats (3)": {"n_repeats": 1, "img_count": 4},
            "meta.json": {"n_repeats": 5, "img_count": 2},
        },
    }
    errors = [dataset["bucket_info"] and dataset["bucket_info"].pop("mean_img_ar_error") for dataset in datasets]
    assert errors[0] == pytest.approx(2 * abs(80 / 48 - 2) / 8) and errors[1] is None and errors[2] == pytest.approx(0)
    bucket = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128}
    assert datasets[0] == {
        "is_dreambooth": True, "batch_size_per_device": 3, "num_train_images": 9, "num_reg_images": 3,
        "resolution": [64, 64], **bucket, "tag_frequency": cats,
        "bucket_info": {
            "buckets": {"0": {"resolution": [64, 64], "count": 14}, "1": {"resolution": [80, 48], "count": 4}}
        },
        "subsets": [
            folder("cats", img_count=4, num_repeats=2, flip_aug=True, shuffle_caption=True, keep_tokens=1),
            folder("cats", color_aug=True),
            folder("animals", img_count=3, tokens="animal", is_reg=True, flip_aug=True),
        ],
    }  # fmt: skip
    normal = {"enable_bucket": False, "min_bucket_reso": None, "max_bucket_reso": None}
    assert datasets[1] == {
        "is_dreambooth": True, "batch_size_per_device": 1, "num_train_images": 4, "num_reg_images": 0,
        "resolution": [64, 96], **normal, "tag_frequency": {"cats": {"cat": 4, "grass": 2}}, "bucket_info": None,
        "subsets": [folder("cats", img_count=4, flip_aug=True, random_crop=True)],
    }  # fmt: skip
    assert datasets[2] == {
        "is_dreambooth": False, "batch_size_per_device": 3, "num_train_images": 10, "num_reg_images": 0,
        "resolution": None, **normal, "enable_bucket": True, "tag_frequency": {"meta.json": {"cat": 1, "red": 1}},
        "bucket_info": {"buckets": {"0": {"resolution": [96, 48], "count": 10}}},
        "subsets": [subset(image_dir="pictures", metadata_file="meta.json", img_count=2, num_repeats=5, flip_aug=True)],
    }  # fmt: skip


def test_folders_of_the_command_line(root):
    (root / "train").mkdir()
    (root / "cats").rename(root / "train" / "3_cat")
    (root / "reg").mkdir()
    (root / "animals").rename(root / "reg" / "1_animal")
    groups = (
        BucketOptions((64, 64), **BUCKET),
        CaptionOptions(caption_extension=".txt", keep_tokens=2, shuffle_caption=True),
        AugmentOptions(flip_aug=True), LoaderOptions(2),
    )  # fmt: skip
    data = loaded(SourceOptions(str(root / "train"), str(root / "reg")), *groups)
    found = data.metadata(num_processes=2, accumulation=4)
    errors = json.loads(found.pop("ss_bucket_info"))
    assert errors["buckets"] == {"0": {"resolution": [64, 64], "count": 18}, "1": {"resolution": [80, 48], "count": 6}}
    assert errors["mean_img_ar_error"] == pytest.approx(2 * abs(80 / 48 - 2) / 7)
    assert found == {
        "ss_num_train_images": 12, "ss_num_reg_images": 3, "ss_num_validation_images": 0,
        "ss_batch_size_per_device": 2, "ss_total_batch_size": 16, "ss_resolution": (64, 64), "ss_color_aug": False,
        "ss_flip_aug": True, "ss_random_crop": False, "ss_shuffle_caption": True, "ss_keep_tokens": 2,
        "ss_enable_bucket": True, "ss_bucket_no_upscale": False, "ss_min_bucket_reso": 32, "ss_max_bucket_reso": 128,
        "ss_dataset_dirs": json.dumps({"3_cat": {"n_repeats": 3, "img_count": 4}}),
        "ss_reg_dataset_dirs": json.dumps({"1_animal": {"n_repeats": 1, "img_count": 3}}),
        "ss_tag_frequency": json.dumps({"3_cat": {"cat": 4, "grass": 2}, "1_animal": {"animal": 3}}),
    }  # fmt: skip


def test_a_metadata_file_of_the_command_line(root):
    source = SourceOptions(str(root / "pictures"), in_json=str(root / "meta.json"), dataset_repeats=2)
    found = loaded(source).metadata()
    assert json.loads(found["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 2, "img_count": 2}}
    assert json.loads(found["ss_tag_frequency"]) == {"meta.json": {"cat": 1, "red": 1}}
    assert json.loads(found["ss_reg_dataset_dirs"]) == {} and found["ss_enable_bucket"] is True
    assert json.loads(found["ss_bucket_info"])["buckets"] == {"0": {"resolution": [96, 48], "count": 4}}
