"""What the training data consists of, what is said of it, and what happens to broken images."""

import json
import logging
import os

import pytest

from library.data.batch import Position
from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.findings import find
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, LoaderOptions, SourceOptions
from library.options import OptionError
from library.train.data_sections import data_sections
from library.train.report import Report, full_text
from tests.tiny_data import tiny_images
from tests.tiny_runs import batches, build, cache


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five training images x 2 in three shapes, twelve regularisation images."""
    root = tmp_path_factory.mktemp("data")
    tiny_images(root / "train" / "2_cat", 5, sizes=((70, 64), (96, 64), (64, 96)))
    tiny_images(root / "reg" / "1_animal", 12, sizes=((70, 64), (96, 64)), captions=[], seed=50)
    return root / "train", root / "reg"


# ---------------------------------------------------------------------------------------------- composition


def count_shown(data, epoch):
    names: dict[str, int] = {}
    for batch in batches(data, start=Position(epoch, 0), epochs=epoch).values():
        for name in batch.image_names:
            names[name] = names.get(name, 0) + 1
    return names


def test_all_regularisation_images_are_used_over_time(folders):
    data = build(*folders)
    assert (data.num_train_images, data.num_reg_images, data.is_empty) == (10, 12, False)
    seen = set()
    for epoch in (1, 2):
        shown = count_shown(data, epoch)
        reg = {name: count for name, count in shown.items() if "1_animal" in name}
        assert sum(reg.values()) == 10 and set(reg.values()) == {1}
        assert sum(shown.values()) == 20
        seen |= set(reg)
    assert len(seen) == 12


def test_few_regularisation_images_are_repeated_as_the_trade_does(tmp_path):
    tiny_images(tmp_path / "train" / "10_a", 2)
    tiny_images(tmp_path / "reg" / "1_b", 6)
    data = build(tmp_path / "train", tmp_path / "reg")
    for epoch in (1, 2):
        shown = count_shown(data, epoch)
        assert [shown[name] for name in sorted(shown) if "1_b" in name] == [4, 4, 3, 3, 3, 3]


def test_regularisation_in_more_sizes_than_an_epoch_shows(tmp_path):
    tiny_images(tmp_path / "train" / "1_a", 1, sizes=((64, 64),))
    tiny_images(tmp_path / "reg" / "1_b", 3, sizes=((64, 64), (96, 64), (64, 96)))
    data = build(tmp_path / "train", tmp_path / "reg", batch_size=4)
    found = batches(data, epochs=6)
    assert data.batches_per_epoch(1) == 2 and len(found) == 12
    assert len({name for batch in found.values() for name in batch.image_names}) == 4
    for batch in batches(data, process_index=1, num_processes=2, epochs=2).values():
        assert batch.loss_weight_B.tolist() == [0] and batch.denominator == 0.5


def test_regularisation_keeps_its_own_settings(tmp_path):
    tiny_images(tmp_path / "a", 4, captions=["x, y, z"])
    tiny_images(tmp_path / "b", 4, captions=["x, y, z"])
    (tmp_path / "d.json").write_text(
        json.dumps(
            {
                "general": {"resolution": 64, "batch_size": 2},
                "datasets": [
                    {
                        "subsets": [
                            {"image_dir": str(tmp_path / "b"), "is_reg": True, "caption_prefix": "reg"},
                            {"image_dir": str(tmp_path / "a"), "caption_dropout_rate": 1.0},
                        ]
                    }
                ],
            }
        )
    )
    data = build_file(tmp_path / "d.json")
    for batch in batches(data).values():
        for name, caption in zip(batch.image_names, batch.captions, strict=True):
            assert caption == ("reg x, y, z" if "/b/" in name else "")


def build_file(path, **groups):
    configs = load_configs(
        SourceOptions(dataset_config=path), BucketOptions(), CaptionOptions(), AugmentOptions(), LoaderOptions()
    )
    return TrainingData.build(configs, seed=1, on_bad_image="stop")


def two_sizes(tmp_path):
    tiny_images(tmp_path / "a", 3)
    tiny_images(tmp_path / "r", 2, captions=["old, Tag"])
    folder = {"image_dir": str(tmp_path / "a"), "num_repeats": 2}
    reg = {"image_dir": str(tmp_path / "r") + "/", "is_reg": True, "class_tokens": "c"}
    content = {
        "datasets": [
            {"resolution": 64, "batch_size": 4, "subsets": [folder, reg]},
            {"resolution": [32, 64], "batch_size": 3, "subsets": [folder | {"flip_aug": True}]},
        ]
    }
    (tmp_path / "d.json").write_text(json.dumps(content))
    return build_file(tmp_path / "d.json")


def test_datasets_have_their_own_size_and_batch_size(tmp_path):
    data = two_sizes(tmp_path)
    assert [dataset.bucket_counts for dataset in data.datasets] == [(((64, 64), 12),), (((32, 64), 6),)]
    assert data.batches_per_epoch(1) == 5
    found = batches(data, epochs=1).values()
    assert sorted((tuple(batch.images_BCHW.shape[2:]), batch.size) for batch in found) == [
        ((64, 32), 3), ((64, 32), 3), ((64, 64), 4), ((64, 64), 4), ((64, 64), 4),
    ]  # fmt: skip


def test_regularisation_images_in_a_dataset_of_their_own_are_told(tmp_path, caplog):
    tiny_images(tmp_path / "a", 3)
    tiny_images(tmp_path / "r", 2)
    folders = [{"image_dir": str(tmp_path / "a")}, {"image_dir": str(tmp_path / "r"), "is_reg": True}]
    content = {"general": {"resolution": 64}, "datasets": [{"subsets": [folder]} for folder in folders]}
    (tmp_path / "d.json").write_text(json.dumps(content))
    data = build_file(tmp_path / "d.json")
    assert f"{tmp_path / 'r'}: regularisation images are not used without training images" in caplog.text
    findings = find(
        data.datasets, data.scan, num_processes=1, token_limit=75, count_tokens=lambda texts: [1] * len(texts)
    )
    text = full_text(Report("", "", (), (), tuple(data_sections(findings, SourceOptions()))))
    assert "none of 2 (2 images x repeats): no training images in their dataset" in text


def test_one_folder_at_two_sizes_can_be_cached_on_disk(tmp_path):
    data = two_sizes(tmp_path)
    cache(data, cache_latents_to_disk=True)
    assert {path.name for path in (tmp_path / "a").glob("*.npz")} == {
        f"image_00{n}.{kind}.{size}.npz" for n, kind in enumerate(("png", "jpg", "png")) for size in ("64x64", "32x64")
    }
    assert {path.name for path in (tmp_path / "r").glob("*.npz")} == {"image_000.npz", "image_001.npz"}
    for batch in batches(data, epochs=4).values():
        height, width = batch.target_hw_B2[0].tolist()
        assert batch.latents_BCHW.shape == (batch.size, 4, height // 8, width // 8)


# ---------------------------------------------------------------------------------------------- reports


def test_metadata_of_class_folders(folders):
    data = build(*folders)
    found = {key: str(value) for key, value in data.metadata(num_processes=2, accumulation=3).items()}
    assert found["ss_num_train_images"] == "10" and found["ss_num_reg_images"] == "12"
    assert found["ss_batch_size_per_device"] == "2" and found["ss_total_batch_size"] == "12"
    assert found["ss_resolution"] == "(64, 64)" and found["ss_enable_bucket"] == "True"
    assert json.loads(found["ss_dataset_dirs"]) == {"2_cat": {"n_repeats": 2, "img_count": 5}}
    assert json.loads(found["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 12}}
    assert json.loads(found["ss_tag_frequency"])["2_cat"]["tiny"] == 5
    assert json.loads(found["ss_tag_frequency"])["1_animal"] == {"animal": 12}
    info = json.loads(found["ss_bucket_info"])
    assert sum(bucket["count"] for bucket in info["buckets"].values()) == 20
    assert info["buckets"]["0"]["resolution"] == [48, 80] and 0 < info["mean_img_ar_error"] < 0.3
    assert "ss_datasets" not in found


def test_metadata_of_a_dataset_file(tmp_path):
    found = two_sizes(tmp_path).metadata()
    first, second = json.loads(found["ss_datasets"])
    assert (first["resolution"], first["batch_size_per_device"], first["num_train_images"]) == ([64, 64], 4, 6)
    assert first["num_reg_images"] == 2 and first["bucket_info"] is None and first["is_dreambooth"] is True
    assert first["subsets"][1]["image_dir"] == "r" and first["subsets"][1]["class_tokens"] == "c"
    assert second["subsets"][0]["flip_aug"] is True and second["subsets"][0]["img_count"] == 3
    assert json.loads(found["ss_dataset_dirs"]) == {
        "a": {"n_repeats": 2, "img_count": 3},
        "a (2)": {"n_repeats": 2, "img_count": 3},
    }
    assert json.loads(found["ss_tag_frequency"])["r"] == {"old": 2, "tag": 2}
    assert found["ss_num_train_images"] == 12 and "ss_resolution" not in found


# ---------------------------------------------------------------------------------------------- bad input


def with_broken(folder):
    paths = tiny_images(folder / "1_a", 4)
    paths[1].write_bytes(paths[1].read_bytes()[:-60])  # the header is well
    (folder / "1_a" / "empty.webp").write_bytes(b"")
    return folder


def test_all_broken_images_are_listed_at_once(tmp_path):
    with pytest.raises(OptionError) as caught:
        build(with_broken(tmp_path))
    for part in ("2 broken images", "image_001.jpg: ", "truncated", "empty.webp: is empty", "--on_bad_image skip"):
        assert part in str(caught.value)


def test_broken_images_can_be_skipped(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = build(with_broken(tmp_path), augment=AugmentOptions(), on_bad_image="skip")
    assert len(data.scan.broken) == 2
    assert data.num_train_images == 3
    cache(data)
    assert len({name for batch in batches(data).values() for name in batch.image_names}) == 3


def test_nothing_left_to_train_on(tmp_path):
    (tmp_path / "1_a").mkdir()
    (tmp_path / "1_a" / "a.png").write_bytes(b"no image")
    with pytest.raises(OptionError, match="none left to train on"):
        build(tmp_path, on_bad_image="skip")


def test_images_known_from_the_cache_are_not_decoded_again(tmp_path):
    path = tiny_images(tmp_path / "1_a", 3)[0]
    cache(build(tmp_path, augment=AugmentOptions()), cache_latents_to_disk=True)
    before = path.stat()
    damaged = path.read_bytes()[:60]
    path.write_bytes(damaged.ljust(before.st_size, b"\0"))
    with pytest.raises(OptionError, match="1 broken image"):
        build(tmp_path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # nothing tells any more that it has changed
    assert build(tmp_path).num_train_images == 3


def test_caching_is_refused_with_the_reason(folders):
    with pytest.raises(OptionError, match="--cache_latents: contradicts color_aug"):
        cache(build(*folders))
