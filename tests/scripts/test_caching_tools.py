"""tools/cache_latents.py and tools/cache_text_encoder_outputs.py: their caches are those of training runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.runs import caching_tool, equal_files, in_two_processes, script, sdxl_train_network, train_network
from tests.runs import flags as words
from tests.scripts.conftest import short_run
from tests.tiny_data import tiny_image, tiny_images
from tests.tiny_models import tiny_sd_checkpoint

ON_DISK = {"cache_latents_to_disk": True}
TEXT_ON_DISK = {"cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True}


@pytest.fixture
def data(tmp_path, images):
    """A copy of the training images, to write caches into."""
    folder = tmp_path / "data"
    shutil.copytree(images, folder)
    return folder


@pytest.fixture
def options(tmp_path, data, tiny_sd1_path):
    return short_run(tmp_path, data, tiny_sd1_path)


@pytest.fixture
def sdxl_options(tmp_path, data, tiny_sdxl_path):
    return short_run(tmp_path, data, tiny_sdxl_path)


def caches(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


def contents(folder: Path) -> dict[str, dict[str, list]]:
    found = {}
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as arrays:
            found[path.name] = {name: arrays[name].tolist() for name in arrays if name != "fingerprint"}
    return found


def said(capfd) -> str:
    return capfd.readouterr().err


def last_line(capfd) -> str:
    return said(capfd).splitlines()[-1]


# ---------------------------------------------------------------------------------------------- one cache


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_training_uses_the_latents_of_the_tool(family, tmp_path, data, options, sdxl_options, capfd):
    """The whole command line of a run, given to the tool; the run then encodes nothing, and ends in the same bits."""
    options, train = (options, train_network) if family == "sd1" else (sdxl_options, sdxl_train_network)
    options |= {"flip_aug": True, "vae_batch_size": 2, **ON_DISK}
    alone = tmp_path / "alone"
    shutil.copytree(data, alone)
    assert caching_tool("cache_latents", **options) == 0
    assert "0 of 6 cached before, 6 new" in said(capfd)
    made = caches(data)
    assert len(made) == 6
    assert train(**options) == 0
    assert "6 of 6 cached before, 0 new" in said(capfd)
    assert caches(data) == made
    assert train(**{**options, "output_dir": tmp_path / "alone_out", "train_data_dir": alone}) == 0
    assert contents(alone) == contents(data)
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "alone_out" / "net.safetensors")
    assert caching_tool("cache_latents", **{**options, "train_data_dir": alone}) == 0
    assert "6 of 6 cached before, 0 new" in said(capfd), "and the reverse"


def test_training_uses_the_text_of_the_tool(tmp_path, data, sdxl_options, capfd):
    options = {**sdxl_options, "shuffle_caption": True, "text_variations": 2, "max_token_length": 150, **TEXT_ON_DISK}
    alone = tmp_path / "alone"
    shutil.copytree(data, alone)
    assert caching_tool("cache_text_encoder_outputs", **options, clip_skip=2) == 0
    assert "text: 0 of 6 cached before, 6 new" in said(capfd)
    assert set(caches(data)) == {f"image_00{number}_te_outputs.npz" for number in range(6)}
    assert sdxl_train_network(**options) == 0
    assert "text: 6 of 6 cached before, 0 new" in said(capfd)
    assert sdxl_train_network(**{**options, "output_dir": tmp_path / "alone_out", "train_data_dir": alone}) == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "alone_out" / "net.safetensors")
    capfd.readouterr()
    assert caching_tool("cache_text_encoder_outputs", **{**options, "train_data_dir": alone}) == 0
    assert "text: 6 of 6 cached before, 0 new" in said(capfd), "and the reverse"


def test_precision_is_that_of_training(sdxl_options, capfd):
    """The fingerprint knows the precision: a cache in bfloat16 and 8 bits is found by the run that uses them."""
    options = {**sdxl_options, "mixed_precision": "bf16", "fp8_base": True, **ON_DISK, **TEXT_ON_DISK}
    assert caching_tool("cache_latents", **options) == 0
    assert caching_tool("cache_text_encoder_outputs", **options) == 0
    capfd.readouterr()
    assert sdxl_train_network(**{**options, "max_train_steps": 1}) == 0
    told = said(capfd)
    assert "latents: 6 of 6 cached before, 0 new" in told and "text: 6 of 6 cached before, 0 new" in told


def test_a_configuration_file_of_a_run(tmp_path, options, data, capfd):
    file = tmp_path / "run.toml"
    assert train_network(**options, save_model_as="pt", output_config=True, config_file=file) == 0
    assert caching_tool("cache_latents", config_file=file) == 0
    assert len(caches(data)) == 6


def test_two_processes_share_the_work(tmp_path, options, data):
    alone = tmp_path / "alone"
    shutil.copytree(data, alone)
    in_two_processes("tools/cache_latents.py", **options, vae_batch_size=2)
    assert caching_tool("cache_latents", **{**options, "train_data_dir": alone}, vae_batch_size=2) == 0
    assert contents(data) == contents(alone)


def test_only_the_part_that_encodes_is_read(options, monkeypatch):
    """A U-Net of many gigabytes is not copied anywhere to encode pictures."""
    from library.families import sd_parts

    filled, fill = [], sd_parts.fill

    def noted(module, *args, **settings):
        filled.append(type(module).__name__)
        return fill(module, *args, **settings)

    monkeypatch.setattr(sd_parts, "fill", noted)
    assert caching_tool("cache_latents", **options) == 0
    assert filled == ["AutoencoderKL"]


# ---------------------------------------------------------------------------------------------- what is there already


def test_only_what_changed_is_made_anew(options, data, tmp_path, capfd):
    assert caching_tool("cache_latents", **options) == 0
    folder = data / "2_disc"
    tiny_image((64, 64), seed=99).save(folder / "image_000.png")
    os.truncate(folder / "image_001.npz", 400)
    capfd.readouterr()
    assert caching_tool("cache_latents", **options) == 0
    told = said(capfd)
    assert "2 to be rebuilt (1 image changed, 1 unreadable)" in told
    assert "4 of 6 cached before, 0 new" in told
    other = tiny_sd_checkpoint(tmp_path / "other.safetensors", "sd1", seed=5)
    assert caching_tool("cache_latents", **options, vae=other) == 0
    assert "6 to be rebuilt (6 other VAE)" in said(capfd)
    assert caching_tool("cache_latents", **{**options, "resolution": 128, "vae": other}) == 0
    assert "other size" in said(capfd)


@pytest.mark.parametrize("tool", ["cache_latents", "cache_text_encoder_outputs"])
def test_files_of_other_programs_are_trusted_when_asked(sdxl_options, data, tool, capfd):
    for image in data.rglob("image_*.*g"):  # one line each, as the trade's tools read it
        image.with_suffix(".caption").write_text(f"picture {image.stem}")
    assert caching_tool(tool, **sdxl_options) == 0
    for path in data.rglob("*.npz"):
        with np.load(path) as arrays:
            kept = {name: arrays[name] for name in arrays if name != "fingerprint"}
        np.savez(path, **kept)
    foreign = caches(data)
    capfd.readouterr()
    assert caching_tool(tool, **sdxl_options, skip_existing=True) == 0
    assert "6 of 6 cached before, 0 new" in said(capfd)
    assert caches(data) == foreign
    assert caching_tool(tool, **sdxl_options) == 0
    assert "6 of another program, which does not say what made them" in said(capfd)
    assert all(b"fingerprint" in content for content in caches(data).values())


def test_it_goes_on_where_it_was_killed(options, data, capfd):
    """SIGTERM in the middle: exit code 143, whole files only; the same command does the rest."""
    tiny_images(data / "1_more", 120, seed=50)
    program = (
        "import os, signal, sys, threading, pathlib\n"
        "folder = pathlib.Path(sys.argv.pop(1)); number = int(sys.argv.pop(1))\n"
        "before = len(list(folder.rglob('*.npz')))\n"
        "def kill():\n"
        "    while len(list(folder.rglob('*.npz'))) < before + 10: pass\n"
        "    os.kill(os.getpid(), number)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        "from library.cli.caching import run\n"
        "from tools.cache_latents import TOOL\n"
        "sys.exit(run(TOOL))\n"
    )
    starter = data.parent / "start.py"
    starter.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    stopped = script(str(starter), data, "15", *words(**options), env=environment)
    assert stopped.returncode == 143, stopped.stderr
    assert "the same command goes on from there" in stopped.stderr
    assert 10 <= len(caches(data)) < 126 and not list(data.rglob("*.tmp"))
    killed = script(str(starter), data, "9", *words(**options), env=environment)
    assert killed.returncode == -9
    capfd.readouterr()
    assert caching_tool("cache_latents", **options) == 0
    told = said(capfd)
    assert "stale cache" not in told and "latents: 0 of 126" not in told
    assert caching_tool("cache_latents", **options, verify=True) == 0


# ---------------------------------------------------------------------------------------------- verify, gc


def test_verify_latents(options, data, capfd):
    assert caching_tool("cache_latents", **options) == 0
    before = caches(data)
    assert caching_tool("cache_latents", **options, verify=True) == 0
    assert "6 cache files checked, 0 not valid" in said(capfd)
    folder = data / "2_disc"
    os.truncate(folder / "image_000.npz", 300)
    (folder / "image_001.npz").unlink()
    (folder / "image_002.npz").write_bytes(b"my own notes")
    tiny_image((64, 96), seed=99).save(folder / "image_005.jpg")
    damaged = caches(data)
    assert caching_tool("cache_latents", **options, verify=True) == 1
    told = said(capfd)
    for line in (
        "image_000.npz: damaged (unreadable)", "image_001.npz: missing", "image_002.npz: not a latent cache",
        "image_005.npz: stale (image changed)", "6 cache files checked, 4 not valid",
    ):  # fmt: skip
        assert line in told
    assert caches(data) == damaged != before, "nothing is changed"


def test_verify_text(sdxl_options, data, capfd):
    assert caching_tool("cache_text_encoder_outputs", **sdxl_options) == 0
    assert caching_tool("cache_text_encoder_outputs", **sdxl_options, verify=True) == 0
    (data / "2_disc" / "image_003.txt").write_text("something else")
    assert caching_tool("cache_text_encoder_outputs", **sdxl_options, verify=True) == 1
    assert "image_003_te_outputs.npz: stale (of other captions)" in said(capfd)


def test_gc_removes_what_belongs_to_nothing(options, sdxl_options, data, tmp_path, capfd):
    assert caching_tool("cache_latents", **options) == 0
    assert caching_tool("cache_text_encoder_outputs", **sdxl_options) == 0
    folder = data / "2_disc"
    (folder / "image_000.png").unlink()
    shutil.copy(folder / "image_001.npz", folder / "image_001.jpg.512x512.npz")
    shutil.copy(folder / "image_001.npz", folder / "image_001_0096x0064_sd.npz")
    np.savez(folder / "mine.npz", measurements=np.ones(3))
    (folder / "text.npz").write_text("not even an archive")
    young, old = (folder / f"image_002.npz.0123456{digit}.tmp" for digit in "78")
    for path in (young, old):
        path.write_bytes(b"PK")
    os.utime(old, (1, 1))
    before = set(caches(data))
    assert caching_tool("cache_latents", **options, gc=True) == 0
    told = said(capfd)
    assert set(caches(data)) == before
    for line in (
        "image_000.npz: its image is gone",
        "image_001.jpg.512x512.npz: its image is in the data, but not with this size",
        "image_002.npz.01234568.tmp: was left unfinished", "3 files", "add --yes",
    ):  # fmt: skip
        assert line in told
    assert caching_tool("cache_latents", **options, gc=True, yes=True) == 0
    assert before - set(caches(data)) == {"image_000.npz", "image_001.jpg.512x512.npz"}
    assert young.exists() and not old.exists()
    assert caching_tool("cache_text_encoder_outputs", **sdxl_options, gc=True, yes=True) == 0
    assert before - set(caches(data)) == {"image_000.npz", "image_001.jpg.512x512.npz", "image_000_te_outputs.npz"}
    assert caching_tool("cache_latents", **options, gc=True) == 0
    assert "nothing to remove" in said(capfd)


def test_gc_leaves_images_outside_the_data_set_alone(options, data, tmp_path, capfd):
    folder = data / "2_disc"
    assert caching_tool("cache_latents", **options) == 0
    metadata = tmp_path / "meta.json"
    metadata.write_text('{"image_000": {"caption": "x"}}')
    settings = {**options, "train_data_dir": folder, "in_json": metadata}
    assert caching_tool("cache_latents", **settings, gc=True) == 0
    assert "nothing to remove" in said(capfd), "the other five have images, only not in this data set"


# ---------------------------------------------------------------------------------------------- packs


def test_packs_of_the_tool_are_those_of_training(options, data, tmp_path, capfd):
    """Made by the tool from files that are there; the run takes them up, and ends as one with files."""
    options |= {"flip_aug": True, **ON_DISK}
    assert train_network(**{**options, "output_dir": tmp_path / "files"}) == 0
    capfd.readouterr()
    assert caching_tool("cache_latents", **options, cache_format="packed") == 0
    assert "caching latents" not in said(capfd)
    packs = {path.name: path.read_bytes() for path in data.rglob("*.pack")}
    assert set(packs) == {"latents_64x64.pack"} | {name for name in packs if name.startswith("latents_")}
    for path in data.rglob("*.npz"):
        path.unlink()
    settings = {"cache_format": "packed", "max_data_loader_n_workers": 1, "output_dir": tmp_path / "packed"}
    assert train_network(**{**options, **settings}) == 0
    told = said(capfd)
    assert "6 of 6 cached before, 0 new" in told and "checking images" not in told
    assert {path.name: path.read_bytes() for path in data.rglob("*.pack")} == packs and not caches(data)
    assert equal_files(tmp_path / "files" / "net.safetensors", tmp_path / "packed" / "net.safetensors")
    assert caching_tool("cache_latents", **options, cache_format="packed", verify=True) == 0
    tiny_image((64, 64), seed=99).save(data / "2_disc" / "image_000.png")
    assert caching_tool("cache_latents", **options, cache_format="packed", verify=True) == 1
    assert "image_000.png: stale (image changed)" in said(capfd)


# ---------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "sdxl": ({"sdxl": True}, "--sdxl: the model"),
    "yes": ({"yes": True}, "--yes: confirms nothing without --gc"),
    "both": ({"verify": True, "gc": True}, "--verify: contradicts --gc"),
    "packs": ({"gc": True, "cache_format": "packed"}, "--cache_format: packed contradicts --gc"),
    "alpha": ({"alpha_mask": True, "cache_format": "packed"}, "--cache_format: packed: packs hold no alpha masks"),
    "random crop": ({"random_crop": True}, "--cache_latents: contradicts random_crop"),
    "a class": ({"dataset_class": "json.Tool"}, "--cache_latents: contradicts --dataset_class"),
    "a typo": ({"vae_batchsize": 2}, "--vae_batchsize: unknown flag; did you mean --vae_batch_size?"),
    "no model": ({"pretrained_model_name_or_path": "no.safetensors"}, "does not exist"),
    "v2": ({"v2": True}, "--v2: the model"),
    "no size": ({"resolution": None}, "--resolution: is not given"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(options, capfd, name):
    settings, sentence = MISTAKES[name]
    assert caching_tool("cache_latents", **{**options, **settings}) == 2
    assert sentence in last_line(capfd)


def test_a_flag_of_later_tools_gets_a_sentence(sdxl_options, capfd):
    assert caching_tool("cache_text_encoder_outputs", **sdxl_options, text_encoder_batch_size=8) == 0
    assert "--text_encoder_batch_size has no effect" in said(capfd)


def test_text_of_other_models(options, capfd):
    assert caching_tool("cache_text_encoder_outputs", **options) == 2
    assert "is an SD 1.x model, and only SDXL trains on cached text" in last_line(capfd)


def test_bad_files_are_named_before_anything_is_encoded(options, data, capfd):
    folder = data / "2_disc"
    (folder / "empty.png").write_bytes(b"")
    assert caching_tool("cache_latents", **options) == 2
    assert "empty.png" in said(capfd) and not caches(data)
    assert caching_tool("cache_latents", **options, on_bad_image="skip") == 0
    assert len(caches(data)) == 6


def test_captions_of_any_kind(sdxl_options, data):
    folder = data / "2_disc"
    (folder / "image_000.txt").write_text("tag, " * 20_000)
    (folder / "image_001.txt").write_bytes("\ufeffжираф, 日本 \U0001f600".encode())
    (folder / "image_002.txt").unlink()
    (folder / "image_003.txt").write_text("")
    assert caching_tool("cache_text_encoder_outputs", **sdxl_options) == 0
    assert caching_tool("cache_text_encoder_outputs", **sdxl_options, verify=True) == 0
    assert len(caches(data)) == 6


def test_names_of_any_kind(options, data):
    folder = data / "2_disc"
    for number, name in enumerate(["été 日本 [x] {y}.png", "two.dots.png", "a  b's.png"]):
        shutil.copy(folder / f"image_00{2 * (number % 3)}.png", folder / name)
    shutil.copy(folder / "image_000.png", folder / "two.dots.webp.png")
    assert caching_tool("cache_latents", **options) == 0
    assert {"été 日本 [x] {y}.npz", "two.dots.npz", "a  b's.npz", "two.dots.webp.npz"} <= set(caches(data))
    assert caching_tool("cache_latents", **options, verify=True) == 0
    assert caching_tool("cache_latents", **options, gc=True, yes=True) == 0
    assert len(caches(data)) == 10
