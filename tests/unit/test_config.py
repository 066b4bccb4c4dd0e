"""Datasets from the command line and from dataset files: inheritance, and what is said when something is wrong."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import toml
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.config import DatasetConfig, check_cacheable, load_configs
from library.data.dataset_file import DATASET_KEYS, INHERITED_KEYS, SUBSET_KEYS, read
from library.data.options import (
    AugmentOptions,
    BucketOptions,
    CacheOptions,
    CaptionOptions,
    LoaderOptions,
    SourceOptions,
)
from library.options import OptionError
from tests.tiny_data import tiny_image, tiny_images


def load(source, *, bucket=None, caption=None, augment=None, loader=None) -> tuple[DatasetConfig, ...]:
    return load_configs(
        source,
        bucket or BucketOptions(resolution=(64, 64)),
        caption or CaptionOptions(),
        augment or AugmentOptions(),
        loader or LoaderOptions(),
    )


def load_folder(path, reg=None, **groups):
    (config,) = load(SourceOptions(train_data_dir=str(path), reg_data_dir=reg and str(reg)), **groups)
    return config


def load_file(path: Path, content, **groups):
    path.write_text(content if isinstance(content, str) else toml.dumps(content), encoding="utf-8")
    return load(SourceOptions(dataset_config=path), **groups)


@pytest.fixture
def images(tmp_path):
    tiny_images(tmp_path / "images", 1)
    return str(tmp_path / "images")


# ---------------------------------------------------------------------------------------------- dataset file


def test_the_nearest_level_wins(tmp_path, images):
    content = {
        "general": {"resolution": 128, "keep_tokens": 1, "shuffle_caption": True, "num_repeats": 3, "batch_size": 4},
        "datasets": [
            {
                "keep_tokens": 2,
                "batch_size": 2,
                "subsets": [
                    {"image_dir": images, "keep_tokens": 3, "shuffle_caption": False},
                    {"image_dir": f"{images}/."},
                ],
            },
            {
                "resolution": [64, 96],
                "flip_aug": 1,
                "subsets": [{"image_dir": images, "num_repeats": 7, "is_reg": True}],
            },
        ],
    }
    content["datasets"][0]["subsets"].pop()
    first, second = load_file(
        tmp_path / "d.toml",
        content,
        caption=CaptionOptions(keep_tokens=9, caption_prefix="cli"),
        loader=LoaderOptions(train_batch_size=8),
    )
    (subset,) = first.subsets
    assert (first.bucket.resolution, first.batch_size) == ((128, 128), 2)
    assert (subset.caption.keep_tokens, subset.caption.shuffle_caption, subset.folder.num_repeats) == (3, False, 3)
    assert subset.caption.caption_prefix == "cli"
    (subset,) = second.subsets
    assert (second.bucket.resolution, second.batch_size) == ((64, 96), 4)
    assert (subset.caption.keep_tokens, subset.folder.num_repeats, subset.folder.is_reg) == (1, 7, True)
    assert subset.augment.flip_aug is True
    assert first.from_file and not subset.folder.class_tokens


def test_a_false_in_the_file_beats_the_switch(tmp_path, images):
    content = {"datasets": [{"enable_bucket": False, "subsets": [{"image_dir": images, "flip_aug": False}]}]}
    bucket = BucketOptions(resolution=(64, 64), enable_bucket=True, min_bucket_reso=64)
    (config,) = load_file(tmp_path / "d.toml", content, bucket=bucket, augment=AugmentOptions(flip_aug=True))
    assert not config.bucket.enable_bucket and not config.subsets[0].augment.flip_aug


def test_json_and_null(tmp_path, images):
    path = tmp_path / "d.JSON"
    path.write_text(
        json.dumps({"datasets": [{"resolution": None, "subsets": [{"image_dir": images, "class_tokens": "a cat"}]}]})
    )
    (config,) = load(SourceOptions(dataset_config=path))
    assert config.bucket.resolution == (64, 64) and config.subsets[0].folder.class_tokens == "a cat"


def test_extensions_get_their_dot_and_whole_numbers_pass_as_rates(tmp_path, images):
    content = {
        "datasets": [{"subsets": [{"image_dir": images, "caption_extension": "txt", "caption_dropout_rate": 1}]}]
    }
    (config,) = load_file(tmp_path / "d.toml", content)
    assert config.subsets[0].caption.caption_extension == ".txt"
    assert config.subsets[0].caption.caption_dropout_rate == 1.0


def test_doubles_and_zero_repeats_are_passed_over(tmp_path, images, caplog):
    subset = {"image_dir": images}
    content = {
        "datasets": [
            {"subsets": [subset, {**subset, "num_repeats": 2}]},
            {"subsets": [{**subset, "num_repeats": 0}]},
            {"subsets": [subset]},
        ]
    }
    with caplog.at_level(logging.INFO):
        configs = load_file(tmp_path / "d.toml", content)
    assert [[subset.folder.num_repeats for subset in config.subsets] for config in configs] == [[1], [1]]
    assert "datasets[0].subsets[1]: ignored" in caplog.text and "datasets[1].subsets[0]: ignored" in caplog.text


def test_folders_of_the_command_line_are_ignored_in_one_line(tmp_path, images, caplog):
    path = tmp_path / "d.toml"
    path.write_text(toml.dumps({"datasets": [{"subsets": [{"image_dir": images}]}]}))
    with caplog.at_level(logging.INFO):
        load(SourceOptions(train_data_dir="nowhere", reg_data_dir="nowhere", dataset_config=path))
    assert [record.message for record in caplog.records] == [
        "--train_data_dir and --reg_data_dir ignored: --dataset_config names the images"
    ]


SUBSET = "datasets[0].subsets[0]"


@pytest.mark.parametrize(
    ("where", "key", "value", "sentence"),
    [
        ("subset", "num_repeat", 2, f"{SUBSET}.num_repeat: unknown key; did you mean num_repeats?"),
        ("subset", "num_repeats", "two", f"{SUBSET}.num_repeats: 'two' is not a whole number"),
        (
            "subset",
            "resolution",
            64,
            f"{SUBSET}.resolution: unknown at this level; move it to [[datasets]] or [general]",
        ),
        ("subset", "caption_dropout_rate", 1.5, f"{SUBSET}.caption_dropout_rate: 1.5 is out of range; use 0 to 1"),
        ("subset", "metadata_file", "m.json", f"{SUBSET}.metadata_file: 'm.json' is no file; name a .json"),
        ("subset", "metadata_file", "", f"{SUBSET}.metadata_file: '' is not a path"),
        ("subset", "custom_attributes", 3, f"{SUBSET}.custom_attributes: 3 is not a table"),
        ("dataset", "metadata_file", "m", "datasets[0].metadata_file: unknown at this level; move it to [[datasets.s"),
        ("subset", "network_multiplier", 1, f"{SUBSET}.network_multiplier: unknown at this level; move it to [[datase"),
        ("dataset", "network_multiplier", 0, "datasets[0].network_multiplier: 0 would train nothing"),
        ("dataset", "image_dir", "x", "datasets[0].image_dir: unknown at this level; move it to [[datasets.subsets]]"),
        ("dataset", "resolution", 500, "datasets[0].resolution: 500 is not a multiple of 8; use 496"),
        ("subset", "image_dir", "", f"{SUBSET}.image_dir: '' is not a path"),
        ("dataset", "resolution", 1_000_000, "datasets[0].resolution: 1000000 is too large; the largest is 16384"),
        ("dataset", "resolution", [64, 64, 64], "datasets[0].resolution: [64, 64, 64] is not a size"),
        ("dataset", "batch_size", 0, "datasets[0].batch_size: 0 is no batch size; use 1 or more"),
        ("dataset", "train_batch_size", 2, "datasets[0].train_batch_size: unknown key"),
        ("general", "shuffle_captions", True, "general.shuffle_captions: unknown key; did you mean shuffle_caption?"),
        (
            "general",
            "face_crop_aug_range",
            [4, 2],
            "general.face_crop_aug_range: 4,2: the first number is above the second; write 2,4",
        ),
        ("general", "keep_tokens", True, "general.keep_tokens: True is not a whole number"),
        ("file", "dataset", {}, "dataset: unknown key; did you mean datasets?"),
    ],
)
def test_a_wrong_key_is_named_with_its_place(tmp_path, images, where, key, value, sentence):
    subset = {"image_dir": images}
    dataset = {"subsets": [subset]}
    content = {"general": {}, "datasets": [dataset]}
    {"subset": subset, "dataset": dataset, "general": content["general"], "file": content}[where][key] = value
    with pytest.raises(OptionError) as caught:
        load_file(tmp_path / "d.toml", content)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("resolution", [100, "100", "100,64", [100, 64]])
def test_with_buckets_a_resolution_need_be_no_multiple_of_8(tmp_path, images, resolution):
    dataset = {"subsets": [{"image_dir": images}], "enable_bucket": True, "min_bucket_reso": 64}
    content = {"datasets": [{**dataset, "resolution": resolution}]}
    (config,) = load_file(tmp_path / "d.toml", content, bucket=BucketOptions())
    assert config.bucket.resolution in ((100, 100), (100, 64))
    given = BucketOptions(resolution=(100, 100))
    assert load_file(tmp_path / "d.toml", {"datasets": [dataset]}, bucket=given)[0].bucket.resolution == (100, 100)
    dataset["enable_bucket"] = False
    with pytest.raises(OptionError, match="^--resolution: 100 is not a multiple of 8; use 96, or enable_bucket"):
        load_file(tmp_path / "d.toml", {"datasets": [dataset]}, bucket=given)


def test_rules_between_merged_values_name_where_the_value_stands(tmp_path, images):
    content = {
        "general": {"enable_bucket": True, "min_bucket_reso": 96},
        "datasets": [{"subsets": [{"image_dir": images}]}],
    }
    with pytest.raises(OptionError, match=r"^general.min_bucket_reso: 96 is above"):
        load_file(tmp_path / "d.toml", content)
    del content["general"]["min_bucket_reso"]
    with pytest.raises(OptionError, match=r"^--min_bucket_reso: 256 is above"):
        load_file(tmp_path / "d.toml", content)
    with pytest.raises(OptionError, match=r"^datasets\[0\].resolution: is not given"):
        load_file(tmp_path / "d.toml", content, bucket=BucketOptions())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[general]\nresolution = \n", "line 2 is not TOML"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\pictures"\n', "line 3 is not TOML"),
        ("datasets = 3\n", "datasets: is not a list of tables; write [[datasets]]"),
        ("[[datasets]]\nsubsets = 3\n", "datasets[0].subsets: is not a list of tables; write [[datasets.subsets]]"),
        ("general = 3\n", "general: 3 is not a table"),
        ("[[datasets]]\n[[datasets.subsets]]\n", "datasets[0].subsets[0].image_dir: is missing"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "nowhere"\n', "'nowhere' is not a folder"),
        ("", "names no folder of images"),
    ],
)
def test_broken_files(tmp_path, text, sentence):
    with pytest.raises(OptionError) as caught:
        load_file(tmp_path / "d.toml", text)
    assert sentence in str(caught.value)


def test_windows_paths_get_a_hint(tmp_path):
    with pytest.raises(OptionError, match="single quotes"):
        load_file(tmp_path / "d.toml", '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\pictures"\n')


@pytest.mark.parametrize(
    ("name", "sentence"), [("d.yaml", "neither .toml nor .json"), ("missing.toml", "does not exist")]
)
def test_files_that_can_not_be_read(tmp_path, name, sentence):
    (tmp_path / "d.yaml").write_text("")
    with pytest.raises(OptionError, match=f"^--dataset_config: .*{sentence}"):
        load(SourceOptions(dataset_config=tmp_path / name))


def test_a_file_that_leads_to_no_image(tmp_path):
    tiny_images(tmp_path / "a" / "deeper", 2)
    (tmp_path / "b").mkdir()
    content = {"datasets": [{"subsets": [{"image_dir": str(tmp_path / name)} for name in "ab"]}]}
    with pytest.raises(OptionError) as caught:
        load_file(tmp_path / "d.toml", content)
    assert "no images, but 2 in deeper/" in str(caught.value) and "b/: empty" in str(caught.value)


KNOWN = {
    "general": DATASET_KEYS | INHERITED_KEYS,
    "dataset": DATASET_KEYS | INHERITED_KEYS | {"subsets"},
    "subset": SUBSET_KEYS,
}
NAMES = st.one_of(st.sampled_from(sorted(DATASET_KEYS | SUBSET_KEYS)), st.from_regex(r"[a-z_]{1,20}", fullmatch=True))


@given(level=st.sampled_from(sorted(KNOWN)), key=NAMES)
@settings(max_examples=200, deadline=None)
def test_any_key_is_either_known_at_its_level_or_named(tmp_path_factory, level, key):
    path = tmp_path_factory.getbasetemp() / "keys.toml"
    subset, general = {}, {}
    dataset = {"subsets": [subset]}
    {"general": general, "dataset": dataset, "subset": subset}[level].setdefault(key, 1)
    path.write_text(toml.dumps({"general": general, "datasets": [dataset]}))
    place = {"general": "general", "dataset": "datasets[0]", "subset": SUBSET}[level]
    if key in KNOWN[level]:
        content = read(path)
        assert (
            key
            in {
                "general": content.general,
                "dataset": content.datasets[0].own,
                "subset": content.datasets[0].subsets[0],
            }[level].values
        )
    else:
        with pytest.raises(OptionError) as caught:
            read(path)
        assert caught.value.where == f"{place}.{key}"


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_or_refused_with_a_sentence(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read(path)
    except OptionError as error:
        assert str(error)


# ---------------------------------------------------------------------------------------------- rules between options


def test_options_that_need_another_are_told_once(tmp_path, images, caplog):
    subset = {"image_dir": images, "keep_tokens": 2}
    content = {
        "datasets": [
            {"bucket_no_upscale": True, "subsets": [subset]},
            {"token_warmup_min": 3, "subsets": [subset]},
            {"enable_bucket": True, "min_bucket_reso": 64, "bucket_no_upscale": True, "subsets": [subset]},
        ]
    }
    load_file(tmp_path / "d.toml", content)
    assert [record.message for record in caplog.records] == [
        "--bucket_no_upscale has no effect without --enable_bucket",
        "--keep_tokens 2 has no effect without --shuffle_caption, --caption_tag_dropout_rate or --token_warmup_step",
        "--token_warmup_min 3 has no effect without --token_warmup_step",
    ]
    caplog.clear()
    caption = CaptionOptions(shuffle_caption=True, token_warmup_step=10)  # from the command line, for all subsets
    content["datasets"].pop(0)
    load_file(tmp_path / "d.toml", content, caption=caption)
    assert not caplog.records


def test_caching_refuses_what_changes_with_every_draw(tmp_path):
    tiny_image((64, 64)).save(tmp_path / "a.png")
    for name in ("color_aug", "random_crop"):
        config = load_folder(tmp_path, augment=AugmentOptions(**{name: True}))
        check_cacheable([config], CacheOptions())
        for cache in (CacheOptions(cache_latents=True), CacheOptions(cache_latents_to_disk=True)):
            with pytest.raises(OptionError, match=f"^--cache_latents: contradicts {name}"):
                check_cacheable([config], cache)


def test_the_configuration_is_checked_without_torch_and_numpy():
    code = "import sys, library.data.config; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
