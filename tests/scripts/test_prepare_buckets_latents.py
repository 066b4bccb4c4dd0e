"""finetune/prepare_buckets_latents.py: sizes and latents as fine-tuning takes them up."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.runs import alone, in_two_processes, metadata_of, run_script, train_network
from tests.scripts.conftest import short_run
from tests.tiny_data import tiny_image, tiny_images
from tests.tiny_models import tiny_sd_checkpoint

SETTINGS = {"max_resolution": "64,64", "min_bucket_reso": 64, "max_bucket_reso": 128, "bucket_reso_steps": 16}


def prepare(*positional, **options) -> int:
    """The tool in this process; returns the exit code."""
    from library.cli.preparing import run
    from tests.runs import flags

    words = [*map(str, positional), *flags(**{**SETTINGS, **options})]
    return alone(lambda: run("", words))


@pytest.fixture
def folder(tmp_path):
    """Six images of three shapes, one of them photographed on its side, and their captions in a metadata file."""
    folder = tmp_path / "images"
    tiny_images(folder, 6, ((80, 80), (120, 80), (80, 120)), captions=())
    exif = tiny_image((1, 1)).getexif()
    exif[0x0112] = 6
    tiny_image((120, 80), seed=7).save(folder / "image_005.jpg", exif=exif)
    entries = {f"image_00{number}": {"caption": f"picture {number}", "mine": [1]} for number in range(6)}
    (tmp_path / "in.json").write_text(json.dumps(entries))
    return folder


def places(folder, **names):
    root = folder.parent
    return folder, root / names.get("source", "in.json"), root / "out.json"


def sizes(folder) -> dict[str, list[int]]:
    return {
        key: entry["train_resolution"] for key, entry in json.loads((folder.parent / "out.json").read_text()).items()
    }


def run_of(folder, model, **changes):
    options = short_run(folder.parent, folder, model)
    for name in ("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso"):
        del options[name]
    return {**options, "in_json": folder.parent / "out.json", **changes}


def said(capfd) -> str:
    return capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- what is written


def test_sizes_and_files_are_those_of_the_trade(folder, tiny_sd1_path, capfd):
    assert prepare(*places(folder), tiny_sd1_path, flip_aug=True, alpha_mask="1") == 0
    square, wide, tall = [64, 64], [80, 48], [48, 80]
    expected = [square, wide, tall, square, wide, tall]
    assert sizes(folder) == {f"image_00{number}": size for number, size in enumerate(expected)}
    text = (folder.parent / "out.json").read_text()
    content = json.loads(text)
    assert content["image_001"] == {"caption": "picture 1", "mine": [1], "train_resolution": wide}
    assert text.startswith('{\n  "image_000": {\n    "caption"')
    with np.load(folder / "image_001.npz") as arrays:
        assert set(arrays) == {"latents", "latents_flipped", "original_size", "crop_ltrb", "alpha_mask", "fingerprint"}
        assert arrays["latents"].shape == arrays["latents_flipped"].shape == (4, 6, 10)
        assert arrays["latents"].dtype == np.float32
        assert arrays["original_size"].tolist() == [120, 80] and arrays["crop_ltrb"].tolist() == [4, 0, 76, 48]
    told = said(capfd)
    assert "   48 x 80         2" in told and "6 images, aspect ratios" in told


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_takes_the_latents_up(folder, tiny_sd1_path, precision, capfd):
    """Also in another precision than they were made in, and with mirrored images."""
    assert prepare(*places(folder), tiny_sd1_path, flip_aug=True) == 0
    capfd.readouterr()
    assert train_network(**run_of(folder, tiny_sd1_path, flip_aug=True, mixed_precision=precision)) == 0
    told = said(capfd)
    assert "latents: 6 taken from the files beside the images" in told and "caching latents" not in told
    buckets = json.loads(metadata_of(folder.parent / "out" / "net.safetensors")["ss_bucket_info"])["buckets"]
    assert sorted(bucket["resolution"] for bucket in buckets.values()) == [[48, 80], [64, 64], [80, 48]]


def test_fine_tuning_takes_the_latents_up(folder, tiny_sd1_path, capfd):
    """Full weights, in a precision that asks for another VAE dtype than the tool's."""
    import fine_tune

    assert prepare(*places(folder), tiny_sd1_path) == 0
    options = {
        "pretrained_model_name_or_path": tiny_sd1_path, "train_data_dir": folder, "in_json": folder.parent / "out.json",
        "output_dir": folder.parent / "full", "output_name": "full", "max_train_steps": 1, "train_batch_size": 2,
        "mixed_precision": "bf16", "seed": 1,
    }  # fmt: skip
    capfd.readouterr()
    assert run_script(fine_tune, options) == 0
    assert "latents: 6 taken from the files beside the images" in said(capfd)


def test_latents_of_another_model_are_not_taken_up(folder, tiny_sd1_path, tmp_path, capfd):
    other = tiny_sd_checkpoint(tmp_path / "other.safetensors", seed=3)
    assert prepare(*places(folder), other) == 0
    assert train_network(**run_of(folder, tiny_sd1_path, max_train_steps=1)) == 0
    assert "latents beside 6 images are not used (6 other VAE)" in said(capfd)


def test_images_that_are_not_enlarged(folder, tiny_sd1_path, capfd):
    """Free buckets cut more than they shrink; training takes the files for what they are."""
    tiny_image((50, 41), seed=9).save(folder / "image_000.png")
    assert prepare(*places(folder), tiny_sd1_path, bucket_no_upscale=True) == 0
    assert sizes(folder)["image_000"] == [48, 32]
    capfd.readouterr()
    assert train_network(**run_of(folder, tiny_sd1_path, max_train_steps=1)) == 0
    assert "latents: 6 taken from the files beside the images" in said(capfd)
    assert prepare(*places(folder), tiny_sd1_path, bucket_no_upscale=True) == 0
    assert "6 of 6 cached before, 0 new" in said(capfd)


@pytest.mark.parametrize("kind", ["paths", "lines"])
def test_other_forms_of_metadata(folder, tiny_sd1_path, kind, capfd):
    """Keys that are paths, two images of one name, sub-folders; a file of lines."""
    (folder / "below").mkdir()
    shutil.move(folder / "image_005.jpg", folder / "below" / "image_000.jpg")
    shutil.copy(folder / "image_001.jpg", folder / "image_000.jpg")
    keys = [str(folder / name) for name in ("image_000.png", "image_000.jpg", "image_001.jpg", "below/image_000.jpg")]
    if kind == "paths":
        (folder.parent / "in.json").write_text(json.dumps({key: {"tags": "x"} for key in keys}))
        source = "in.json"
    else:
        source = "in.jsonl"
        (folder.parent / source).write_text("".join(json.dumps({"file_name": key}) + "\n" for key in keys))
    assert prepare(*places(folder, source=source), tiny_sd1_path, full_path=True, recursive=True) == 0
    assert list(sizes(folder)) == keys
    assert {path.name for path in folder.rglob("*.npz")} == {
        "image_000.png.npz", "image_000.jpg.npz", "image_001.npz", "image_000.npz",
    }  # fmt: skip
    capfd.readouterr()
    assert train_network(**run_of(folder, tiny_sd1_path, max_train_steps=1)) == 0
    assert "latents: 4 taken from the files beside the images" in said(capfd)


def test_it_goes_on_and_makes_anew_what_changed(folder, tiny_sd1_path, capfd):
    assert prepare(*places(folder), tiny_sd1_path) == 0
    tiny_image((80, 80), seed=50).save(folder / "image_000.png")
    capfd.readouterr()
    assert prepare(*places(folder), tiny_sd1_path) == 0
    told = said(capfd)
    assert "1 to be rebuilt (1 image changed)" in told and "5 of 6 cached before" in told
    assert prepare(*places(folder), tiny_sd1_path, mixed_precision="bf16") == 0
    assert "6 other VAE" in said(capfd), "made anew as asked"
    out = folder.parent / "out.json"
    assert prepare(folder, out, out, tiny_sd1_path, mixed_precision="bf16") == 0, "into the same file"
    assert "6 of 6 cached before" in said(capfd) and len(sizes(folder)) == 6


def test_two_processes_share_the_work(folder, tiny_sd1_path):
    in_two_processes("finetune/prepare_buckets_latents.py", *places(folder), tiny_sd1_path, **SETTINGS)
    assert len(sizes(folder)) == len(list(folder.glob("*.npz"))) == 6


# ---------------------------------------------------------------------------------------------- what does not fit


def test_what_belongs_to_nothing_is_told(folder, tiny_sd1_path, capfd):
    tiny_image((80, 80)).save(folder / "unknown.png")
    (folder / "image_003.jpg").unlink()
    assert prepare(*places(folder), tiny_sd1_path) == 0
    told = said(capfd)
    assert "1 image has no entry and is left out: images/unknown.png" in told
    assert "1 entry leads to no image and stays as it is: image_003" in told
    content = json.loads((folder.parent / "out.json").read_text())
    assert content["image_003"] == {"caption": "picture 3", "mine": [1]} and not (folder / "unknown.npz").exists()


def test_broken_images(folder, tiny_sd1_path, capfd):
    (folder / "image_000.png").write_bytes(b"")
    (folder / "image_002.png").write_bytes((folder / "image_002.png").read_bytes()[:200])
    assert prepare(*places(folder), tiny_sd1_path) == 2
    told = said(capfd)
    assert "2 broken images" in told and "image_000.png" in told and not list(folder.glob("*.npz"))
    assert prepare(*places(folder), tiny_sd1_path, on_bad_image="skip") == 0
    assert len(list(folder.glob("*.npz"))) == 4


def broken_json(folder):
    (folder.parent / "in.json").write_text('{"a": {"caption": "x"},\n"b": }')


MISTAKES = {
    "json": (broken_json, {}, "in.json: line 2 is not JSON"),
    "no entries": (lambda folder: (folder.parent / "in.json").write_text("{}"), {}, "in_json: "),
    "no file": (lambda folder: (folder.parent / "in.json").unlink(), {}, "in_json: "),
    "no folder": (lambda folder: shutil.move(folder, folder.parent / "gone"), {}, "train_data_dir: "),
    "other images": (
        lambda folder: (folder.parent / "in.json").write_text('{"zzz": {}}'), {},
        "train_data_dir: none of the 1 entries of",
    ),
    "size": (None, {"max_resolution": "64,64,64"}, "--max_resolution: '64,64,64' is not a size"),
    "batch": (None, {"batch_size": 0}, "--batch_size: 0 is no batch size"),
    "buckets": (None, {"min_bucket_reso": 256}, "--min_bucket_reso: 256 is above"),
    "typo": (None, {"batchsize": 1}, "--batchsize: unknown flag; did you mean --batch_size?"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(folder, tiny_sd1_path, name, capfd):
    spoil, options, sentence = MISTAKES[name]
    if spoil is not None:
        spoil(folder)
    capfd.readouterr()
    assert prepare(*places(folder), tiny_sd1_path, **options) == 2
    assert sentence in said(capfd).splitlines()[-1]


def test_a_model_that_is_none(folder, capfd):
    assert prepare(*places(folder), "no.safetensors") == 2
    assert "model_name_or_path: no.safetensors does not exist" in said(capfd).splitlines()[-1]
