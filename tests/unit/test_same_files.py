"""One folder or file under two names: never trained twice by mistake, never held out by half, one cache."""

import logging
import os

import pytest

from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.findings import find
from library.data.options import AugmentOptions, CaptionOptions, LoaderOptions, SourceOptions
from library.data.same_files import file_keys
from tests.tiny_data import tiny_images
from tests.tiny_runs import BUCKETS, batches, cache

TWO_DATASETS = """
[[datasets]]
validation_split = {share}
[[datasets.subsets]]
image_dir = '{first}'
[[datasets]]
resolution = 96
[[datasets.subsets]]
image_dir = '{second}'
"""


@pytest.fixture(params=["link", "relative", "relative first", "detour"])
def names(request, tmp_path, monkeypatch):
    """A folder of eight images under two names."""
    folder = tmp_path / "images"
    tiny_images(folder, 8, sizes=[(200, 160)])
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    others = {"link": tmp_path / "link", "relative": "images", "detour": tmp_path / "link" / ".." / "images"}
    if request.param == "relative first":
        return "images", folder
    return folder, others[request.param]


def build(tmp_path, text):
    (tmp_path / "data.toml").write_text(text)
    source = SourceOptions(dataset_config=tmp_path / "data.toml")
    configs = load_configs(source, BUCKETS, CaptionOptions(), AugmentOptions(), LoaderOptions(2))
    return configs, TrainingData.build(configs, seed=1, on_bad_image="stop")


def shown(data):
    return [os.path.basename(name) for batch in batches(data, epochs=1).values() for name in batch.image_names]


def test_what_is_held_out_is_trained_on_under_no_name(tmp_path, names):
    _, data = build(tmp_path, TWO_DATASETS.format(share=0.5, first=names[0], second=names[1]))
    assert (data.validation.num_images, len(shown(data)), len(set(shown(data)))) == (4, 8, 4)


def test_links_to_images_are_held_out_with_them(tmp_path):
    tiny_images(tmp_path / "images", 8)
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "images").iterdir():
        (tmp_path / "links" / f"other_{path.name}").symlink_to(path)
    text = TWO_DATASETS.format(share=0.5, first=tmp_path / "images", second=tmp_path / "links")
    names = shown(build(tmp_path, text)[1])
    assert (len(names), len({name.removeprefix("other_") for name in names})) == (8, 4)


def test_a_folder_twice_in_one_dataset_counts_once(tmp_path, names, caplog):
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = '{name}'\n" for name in names)
    with caplog.at_level(logging.INFO):
        configs, data = build(tmp_path, f"[[datasets]]\n{subsets}")
    assert (len(configs[0].subsets), data.num_train_images) == (1, 8)
    assert "is already part of this dataset" in caplog.text


def test_datasets_of_one_folder_share_a_cache_without_overwriting_each_other(tmp_path, names, caplog):
    for expected in ("0 of 16 cached before, 16 new", "16 of 16 cached before, 0 new"):
        _, data = build(tmp_path, TWO_DATASETS.format(share=0, first=names[0], second=names[1]))
        with caplog.at_level(logging.INFO):
            cache(data, cache_latents_to_disk=True)
        assert expected in caplog.text
        assert len(shown(data)) == 16
    assert len(list((tmp_path / "images").glob("*.npz"))) == 16


def test_a_file_under_two_names_is_no_copy(tmp_path, names):
    _, data = build(tmp_path, TWO_DATASETS.format(share=0, first=names[0], second=names[1]))
    findings = find(
        data.datasets, data.scan, num_processes=1, token_limit=75, count_tokens=lambda texts: [1 for _ in texts]
    )
    assert (findings.equal, findings.alike) == ((), ())
    assert findings.num_looked_at == len(findings.images) == 8


def test_keys_of_names(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    (tmp_path / "y.png").symlink_to("a/x.png")
    monkeypatch.chdir(tmp_path)
    keys = file_keys(["a/x.png", str(tmp_path / "a" / "x.png"), "./a/x.png", "y.png", "z.png"])
    assert len(set(keys.values())) == 2 and keys["y.png"] == keys["a/x.png"] != keys["z.png"]
