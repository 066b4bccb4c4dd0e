"""What training says of broken data: one sentence with numbers and names, and it trains where it can."""

from __future__ import annotations

import importlib
import json

import pytest

from tests.runs import run_script
from tests.tiny_data import tiny_image, tiny_images

SCRIPTS = ("train_network", "train_db", "fine_tune")
NAMES = ("été 日本.png", "two.dots.png", "plain.png")


@pytest.fixture
def folder(tmp_path):
    """Three images of 64 pixels with captions, one under a name that is not ASCII."""
    folder = tmp_path / "data" / "1_disc"
    folder.mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        tiny_image((64, 64), seed=seed).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a picture, number {seed}")
    return folder


@pytest.fixture
def train(tmp_path, folder, tiny_sd1_path, capfd):
    """One step of a script on the folder: its exit code and what it said; `entries` are those of fine_tune's file."""

    def started(script, entries=None, **changes):
        options = {
            "pretrained_model_name_or_path": tiny_sd1_path, "output_dir": tmp_path / "out", "resolution": 64,
            "max_train_steps": 1, "seed": 1, "max_data_loader_n_workers": 0, "train_data_dir": folder.parent,
            "network_module": "networks.lora" if script == "train_network" else None,
        }  # fmt: skip
        if script == "fine_tune":
            entries = {name[:-4]: {"caption": "a picture"} for name in NAMES} if entries is None else entries
            (tmp_path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
            options |= {"train_data_dir": folder, "in_json": tmp_path / "meta.json"}
        capfd.readouterr()
        code = run_script(importlib.import_module(script), {**options, **changes})
        return code, " ".join(capfd.readouterr().err.split())

    return started


@pytest.mark.parametrize("script", ["train_network", "train_db"])
def test_captions_and_images_that_do_not_belong_together(train, folder, script):
    (folder / "plain.txt").unlink()
    for number in range(5):
        (folder / f"gone_{number}.txt").write_text("of an image that was deleted")
    tiny_image((64, 64), seed=9).save(folder / "two.dots.jpg")
    code, said = train(script)
    assert code == 0
    alone = (
        "5 caption files without an image (1_disc/gone_0.txt; 1_disc/gone_1.txt; 1_disc/gone_2.txt and 2 more); look"
    )
    assert said.count(alone) == 1
    assert said.count("1 image without a caption, unlike others of the same folder: trained on 'disc' (1_disc/pl") == 1
    same = "2 images of the same name but for the extension: trained with one caption file (1_disc/two.dots.jpg, 1_"
    assert said.count(same) == 1


def test_captions_of_no_image_at_all_are_told_under_any_extension(train, folder):
    """--caption_extension is .caption where nothing else is said."""
    for name in NAMES:
        (folder / name).with_suffix(".txt").rename(folder / f"other {name[:-4]}.txt")
    code, said = train("train_network", train_data_dir=folder)
    assert code == 0 and "3 caption files without an image (1_disc/other " in said
    assert "3 of 3 images have no caption and are trained on the empty one" in said


def test_images_of_one_name_have_caches_of_their_own(train, folder):
    tiny_image((64, 64), seed=9).save(folder / "plain.jpg")
    assert train("train_network", cache_latents_to_disk=True)[0] == 0
    caches = {"two.dots.npz", "été 日本.npz", "plain.png.npz", "plain.jpg.npz"}
    assert {path.name for path in folder.glob("*.npz")} == caches


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_empty_file_and_one_that_is_too_large(train, folder, script):
    (folder / "plain.png").write_bytes(b"")
    whole = (folder / "two.dots.png").read_bytes()
    (folder / "two.dots.png").write_bytes(whole[:16] + (30_000).to_bytes(4, "big") * 2 + whole[24:])
    code, said = train(script)
    assert code == 2 and "2 broken images; mend or remove them, or use --on_bad_image skip" in said
    assert "plain.png: is empty" in said
    assert "two.dots.png: says that it has 30000x30000 pixels; 20000x20000 is the largest that is read" in said
    code, said = train(script, on_bad_image="skip")
    assert code == 0 and said.count("2 images can't be read and are left out (") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_side_of_20000_pixels(train, folder, script):
    tiny_image((20_000, 64)).save(folder / "plain.png")
    code, said = train(script, enable_bucket=True, min_bucket_reso=64)
    assert code == 0, said
    assert "1 image loses more than 25% of the picture to the cut (1_disc/plain.png" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_caption_of_100000_characters(train, folder, script):
    long = ("a long word, " * 7693)[:100_000]
    (folder / "plain.txt").write_text(long)
    entries = {name[:-4]: {"caption": long if name == "plain.png" else "short"} for name in NAMES}
    for settings in ({}, {"max_token_length": 225, "shuffle_caption": True}):
        code, said = train(script, entries, **settings)
        limit = settings.get("max_token_length", 75)
        assert code == 0
        assert said.count(f"1 caption longer than the {limit} tokens that are read; the end is cut off (1_disc/pl") == 1


def test_keys_of_windows_and_names_that_are_not_ascii(train):
    keys = ("C:\\pictures\\1_disc\\été 日本.png", "D:/pictures/two.dots.png", "..\\1_disc\\plain")
    code, said = train("fine_tune", {key: {"caption": "a picture"} for key in keys})
    assert code == 0 and "meta.json 3 1 3 training 3 captions" in said and "passed over" not in said


def test_entries_without_images_and_images_without_entries(train, folder):
    tiny_images(folder / "deeper", 1)
    code, said = train("fine_tune", {"plain": {"caption": "a"}, "gone": {"caption": "b"}})
    assert code == 2 and "gone: is in " in said and "but no image and no .npz file of that name is in " in said
    code, said = train("fine_tune", {"plain": {"caption": "a"}, "gone": {"caption": "b"}}, on_bad_image="skip")
    assert code == 0 and "1 image can't be read and is left out" in said
    assert "2 images passed over: in the folder of a metadata file that does not name them" in said


@pytest.mark.parametrize("script", ["train_network", "fine_tune"])
def test_metadata_that_can_not_be_read(train, tmp_path, script):
    """Line and key, before anything is loaded."""
    (tmp_path / "broken.json").write_text('{"plain": {"caption": "a"},\n"two.dots": {"caption" "b"}}')
    code, said = train(script, in_json=tmp_path / "broken.json")
    assert code == 2 and "broken.json: line 2 is not JSON (Expecting ':' delimiter), at 'two.dots'" in said
    (tmp_path / "broken.json").write_text('{"plain": {"caption": 5}}')
    code, said = train(script, in_json=tmp_path / "broken.json")
    assert code == 2 and "broken.json: 'plain' (line 1): caption 5 is not a text" in said
