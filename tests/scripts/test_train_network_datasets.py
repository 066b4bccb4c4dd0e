"""train_network.py on every form of dataset: metadata files, several datasets, a class of one's own."""

import json

import numpy as np
import pytest
import toml

from tests.runs import equal_files, metadata_of, train_network
from tests.tiny_data import tiny_image

TWO_STEPS = {"max_train_steps": 2, "enable_bucket": False}


def trained(options, folder, **changes):
    """The file of a run with these changes."""
    assert train_network(**{**options, **TWO_STEPS, "output_dir": folder, **changes}) == 0
    return folder / "net.safetensors"


@pytest.fixture
def metadata(tmp_path):
    """A folder of four images and their metadata file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate("abcd"):
        tiny_image((64, 64), seed=number).save(folder / f"{name}.png")
    content = {name: {"caption": f"a picture {name}", "tags": "disc, red"} for name in "abcd"}
    (tmp_path / "meta.json").write_text(json.dumps(content))
    return {"train_data_dir": folder, "in_json": tmp_path / "meta.json"}


def test_a_metadata_file(tmp_path, options, metadata):
    file = trained(options, tmp_path / "json", **metadata, dataset_repeats=3)
    found = metadata_of(file)
    assert json.loads(found["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 3, "img_count": 4}}
    assert json.loads(found["ss_tag_frequency"]) == {"meta.json": {"disc": 4, "red": 4}}
    assert json.loads(found["ss_reg_dataset_dirs"]) == {} and found["ss_num_train_images"] == "12"
    lines = tmp_path / "meta.jsonl"
    entries = json.loads(metadata["in_json"].read_text())
    lines.write_text("\n".join(json.dumps({"image_path": name, **said}) for name, said in entries.items()))
    same = trained(options, tmp_path / "jsonl", **{**metadata, "in_json": lines}, dataset_repeats=3)
    assert equal_files(file, same)


def test_latents_beside_the_images_of_a_metadata_file(tmp_path, options, metadata):
    """Without a flag, and without the images: the VAE encodes nothing."""
    entries = json.loads(metadata["in_json"].read_text())
    metadata["in_json"].write_text(
        json.dumps({name: {**said, "train_resolution": [64, 64]} for name, said in entries.items()})
    )
    cached = trained(options, tmp_path / "cached", **metadata, cache_latents_to_disk=True)
    for image in metadata["train_data_dir"].glob("*.png"):
        image.unlink()
    assert equal_files(cached, trained(options, tmp_path / "given", **metadata))
    np.savez(metadata["train_data_dir"] / "a.npz", latents=np.zeros((4, 8, 8)))
    assert train_network(**{**options, **TWO_STEPS, **metadata}) == 2


def test_a_network_multiplier(tmp_path, options, metadata):
    def of(multiplier, name):
        subset = {"image_dir": str(metadata["train_data_dir"]), "class_tokens": "x"}
        content = {"datasets": [{"network_multiplier": multiplier, "subsets": [subset]}]}
        (tmp_path / "d.toml").write_text(toml.dumps(content))
        return trained(options, tmp_path / name, dataset_config=tmp_path / "d.toml", train_data_dir=None)

    plain = of(1.0, "plain")
    assert equal_files(plain, of(1, "same")) and not equal_files(plain, of(2.0, "doubled"))


# ---------------------------------------------------------------------------------------------- a class of one's own

CLASS = '''
import random
import numpy as np
import torch


class Discs(torch.utils.data.Dataset):
    """Five batches of noise and words, three of them of two samples."""

    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        self.tokenizer, self.resolution, self.told = tokenizer, resolution, []
        assert max_token_length is None and debug_dataset is False and resolution == (64, 64)

    def __len__(self):
        return 5

    def set_current_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        count = 1 + index % 2
        images = torch.rand(count, 3, 64, 64) * 2 - 1
        captions = [random.choice("abc") + str(np.random.randint(9)) for _ in range(count)]
        ids = self.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return {"images": images, "captions": captions, "input_ids": ids, "loss_weights": torch.ones(count)}


class WithoutItems:
    def __init__(self, *arguments):
        pass


class Empty(WithoutItems):
    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError


class Unmakeable(Empty):
    def __init__(self):
        pass


class Wrong(Empty):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"images": torch.zeros(1, 3, 60, 64), "captions": ["x"]}
'''


@pytest.fixture
def own_class(tmp_path, monkeypatch):
    (tmp_path / "my_discs.py").write_text(CLASS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield {"dataset_class": "my_discs.Discs", "train_data_dir": None}
    import sys

    sys.modules.pop("my_discs", None)


def test_a_resolution_that_is_only_an_area(options, tmp_path):
    options |= {"resolution": 100, "max_train_steps": 1, "sample_at_first": True, "sample_every_n_steps": 5}
    (tmp_path / "prompts.txt").write_text("a disc --s 1")
    assert train_network(**options, sample_prompts=tmp_path / "prompts.txt") == 0
    metadata = metadata_of(tmp_path / "out" / "net.safetensors")
    assert metadata["ss_resolution"] == "(100, 100)"
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"].values()
    assert all(side % 64 == 0 for bucket in buckets for side in bucket["resolution"])


def test_a_class_of_ones_own(tmp_path, options, own_class, caplog):
    """Its own random draws included, a run is the same again, with workers and when it goes on from a state."""
    steps = {"max_train_steps": 7, "enable_bucket": False, "save_state": True, "save_every_n_steps": 3}
    changes = {**options, **own_class, **steps}
    assert train_network(**{**changes, "output_dir": tmp_path / "a"}) == 0
    assert "--train_batch_size: no effect, --dataset_class makes its own batches" in caplog.text
    assert train_network(**{**changes, "output_dir": tmp_path / "b", "max_data_loader_n_workers": 2}) == 0
    state = tmp_path / "a" / "net-step00000003-state"
    assert train_network(**{**changes, "output_dir": tmp_path / "c", "resume": state}) == 0
    first, *others = (tmp_path / name / "net.safetensors" for name in "abc")
    assert all(equal_files(first, other) for other in others)
    found = metadata_of(first)
    assert (found["ss_num_train_images"], found["ss_num_batches_per_epoch"], found["ss_epoch"]) == ("5", "5", "2")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset_class": "my_discs"}, "--dataset_class: my_discs names no module; write package.module.Class"),
        ({"dataset_class": "my discs.A"}, "--dataset_class: 'my discs.A'; write package.module.Class"),
        ({"dataset_class": "not_there.Discs"}, "--dataset_class: there is no module not_there"),
        (
            {"dataset_class": "my_discs.Other"},
            "--dataset_class: my_discs.Other can't be imported: module 'my_discs' has",
        ),
        ({"dataset_class": "my_discs.WithoutItems"}, "my_discs.WithoutItems has no __len__ and no __getitem__"),
        ({"dataset_class": "my_discs.Empty"}, "my_discs.Empty has no items"),
        ({"dataset_class": "my_discs.Unmakeable"}, "my_discs.Unmakeable can't be made: TypeError"),
        ({"dataset_class": "my_discs.Wrong"}, "item 0 of my_discs.Wrong: its images are 64x60; sides have to be mult"),
        ({"cache_latents": True}, "--cache_latents: contradicts --dataset_class my_discs.Discs"),
    ],
)
def test_a_class_that_can_not_be_used_is_refused_by_name(options, own_class, capsys, changes, sentence):
    assert train_network(**{**options, **TWO_STEPS, "train_batch_size": None, **own_class, **changes}) == 2
    assert sentence in capsys.readouterr().err
