"""tools/latent_upscaler.py as a command: each picture in twice its own size, mistakes as sentences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import script
from tests.tiny_data import tiny_image
from tests.unit.test_latent_upscaler import upscaler_file
from tools import latent_upscaler as tool


@pytest.fixture
def files(tmp_path: Path, tiny_sd1_path: Path) -> dict[str, Path]:
    for name, size in {"a.png": (64, 64), "b.JPG": (75, 50), "c.png": (64, 64), "d.webp": (64, 64)}.items():
        tiny_image(size, seed=len(name) + size[0]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    upscaler = upscaler_file(tmp_path / "up.safetensors", is_new=False)
    return {"vae": tiny_sd1_path, "weights": upscaler, "folder": tmp_path}


def run(files: dict[str, Path], *more: object, pattern: str = "*", out: str = "out") -> int:
    words = ["--vae_path", files["vae"], "--weights", files["weights"], "--output_dir", files["folder"] / out]
    return tool.TOOL.run([str(word) for word in (*words, "--image_pattern", files["folder"] / pattern, *more)])


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_as_a_command(files):
    (files["folder"] / "broken.png").write_bytes(b"nothing")
    words = ["--vae_path", files["vae"], "--weights", files["weights"], "--image_pattern", "*", "--debug"]
    result = script("tools/latent_upscaler.py", *words, "--output_dir", "out", cwd=files["folder"])
    assert result.returncode == 1 and "1 of 5 pictures can't be used" in result.stderr.splitlines()[-1]
    sizes = {path.name: Image.open(path).size for path in (files["folder"] / "out").iterdir()}
    square, other = (128, 128), (144, 96)  # cut to multiples of 8, then doubled
    assert sizes == {f"{name}_{kind}{extension}": size for name, extension, size in (
        ("a", ".png", square), ("b", ".JPG", other), ("c", ".png", square), ("d", ".webp", square),
    ) for kind in ("upscaled", "enlarged")}  # fmt: skip
    assert np.abs(read(files["folder"] / "out/a_upscaled.png") - read(files["folder"] / "out/a_enlarged.png")).max() > 9


def test_batches_change_nothing(files):
    for out, sizes in {"one": (1, 1), "four": (4, 2)}.items():
        assert run(files, "--batch_size", sizes[0], "--vae_batch_size", sizes[1], out=out, pattern="*.png") == 0
    for name in ("a_upscaled.png", "c_upscaled.png"):
        assert np.abs(read(files["folder"] / "one" / name) - read(files["folder"] / "four" / name)).max() <= 1


def test_in_the_folder_of_the_pictures(files, capsys):
    assert run(files, out=".", pattern="[ac].png") == 0
    before = (files["folder"] / "a_upscaled.png").read_bytes()
    assert run(files, out=".", pattern="*.png") == 2
    assert "--output_dir: a_upscaled.png is one of the pictures that are read" in capsys.readouterr().err
    assert (files["folder"] / "a_upscaled.png").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pattern": "*.bmp"}, "*.bmp' fits no picture; check it"),
        ({"pattern": "../{name}"}, "{name}' fits no picture; write \""),
        ({"weights": "none.safetensors"}, "--weights: {folder}/none.safetensors is no file"),
        ({"weights": "notes.txt"}, "--weights: {folder}/notes.txt is no model file"),
        ({"vae": "none.safetensors"}, "--vae_path: {folder}/none.safetensors does not exist"),
        ({"vae": "up.safetensors"}, "--vae_path: {folder}/up.safetensors is no VAE"),
        ({"out": "notes.txt"}, "--output_dir: {folder}/notes.txt can't be made"),
    ],
)
def test_mistakes_are_sentences(files, capsys, change, said):
    folder = files["folder"]
    changed = {name: folder / change[name] if name in change else files[name] for name in ("vae", "weights")}
    options = {name: change[name].format(name=folder.name) for name in ("pattern", "out") if name in change}
    assert run({**files, **changed}, **options) == 2
    assert said.format(folder=folder, name=folder.name) in capsys.readouterr().err


def test_numbers_out_of_range(files, capsys):
    assert run(files, "--batch_size", 0) == 2
    assert "--batch_size: 0 is no number of pictures" in capsys.readouterr().err
