"""tools/canny.py, resize_images_to_resolution.py, detect_face_rotate.py: commands, pictures, messages."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library.cli.picture_folders import LeftOutError, PictureFolder
from library.data.face_crop import face_in_name
from library.data.face_pictures import FoundFace
from library.data.images import resize
from library.options import OptionError
from tests.runs import script
from tests.tiny_data import tiny_image
from tools import canny, detect_face_rotate
from tools import resize_images_to_resolution as resizing
from tools.detect_face_rotate import FaceOptions, cut_all

ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # the picture is shown turned by 90 degrees


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture of each kind that is easily got wrong, and other files."""
    place = tmp_path / "pictures"
    place.mkdir()
    plain = tiny_image((96, 64))
    plain.paste("black", (10, 8, 50, 30))
    plain.save(place / "plain.png")
    tiny_image((90, 60), seed=1).save(place / "CAPITALS.JPG")
    tiny_image((80, 40), seed=2).save(place / "turned.jpg", exif=ROTATED)
    clear = tiny_image((64, 64), seed=3).convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))))
    clear.save(place / "clear.webp", lossless=True)
    tiny_image((16, 16), seed=4).save(place / "small.bmp")
    (place / "plain.txt").write_text("a caption")
    (place / "meta.json").write_text("{}")
    (place / "below").mkdir()
    return place


def run(tool, *words: object) -> int:
    try:
        return tool.TOOL.run([str(word) for word in words])
    except SystemExit as end:  # as the parser ends a program
        return int(end.code or 0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- edges


def test_edges(folder, tmp_path):
    result = script("tools/canny.py", "--input", folder / "plain.png", "--output", "edges.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    made = np.asarray(Image.open(tmp_path / "edges.png"))
    grey = cv2.cvtColor(cv2.imread(str(folder / "plain.png")), cv2.COLOR_BGR2GRAY)
    assert np.array_equal(made, cv2.Canny(grey, 32, 224)) and made.any()


def test_edges_are_upright_and_see_thresholds(folder, tmp_path):
    out = tmp_path / "new folder" / "ü.png"
    assert run(canny, "--input", folder / "turned.jpg", "--output", out, "--thres1", 5, "--thres2", 20) == 0
    few = tmp_path / "few.png"
    assert run(canny, "--input", folder / "turned.jpg", "--output", few, "--thres1", 900, "--thres2", 999) == 0
    many, few = (np.asarray(Image.open(path)) for path in (out, few))
    assert many.shape == (80, 40) and many.sum() > few.sum()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "e.png"], "--input is needed"),
        (["--input", "{folder}/plain.png"], "--output is needed"),
        (["--input", "{folder}/none.png", "--output", "e.png"], "none.png can't be read (No such file"),
        (["--input", "{folder}/plain.txt", "--output", "e.png"], "plain.txt can't be read (is not an image"),
        (["--input", "{folder}/plain.png", "--output", "{folder}/plain.png"], "is the picture that is read, which"),
        (["--input", "{folder}/plain.png", "--output", "{folder}"], "is a folder"),
        (["--input", "{folder}/plain.png", "--output", "e"], "e has no extension of a picture"),
        (["--input", "{folder}/plain.png", "--output", "e.png", "--thres1", "-1"], "--thres1: -1 is negative"),
        (["--input", "{folder}/plain.png", "--output", "{folder}/plain.txt/e.png"], "can't be written"),
    ],
)
def test_mistakes_about_edges(folder, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert run(canny, *(word.format(folder=folder) for word in words)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


# ---------------------------------------------------------------------------------------------- resizing


def test_smaller_copies(folder, tmp_path):
    words = [folder, tmp_path / "out", "--max_resolution", "64x64,32x32", "--copy_associated_files"]
    result = script("tools/resize_images_to_resolution.py", *words)
    assert result.returncode == 0, result.stderr
    stems = ("CAPITALS", "clear", "plain", "small", "turned")
    pictures = [f"{stem}+{size}.jpg" for stem in stems for size in ("64x64", "32x32")]
    captions = ["plain+64x64.txt", "plain+32x32.txt"]
    assert names(tmp_path / "out") == sorted([*pictures, *captions, "plain.txt", "meta.json"])
    sizes = {name: Image.open(tmp_path / "out" / name).size for name in pictures}
    # sqrt(limit / pixels) times each side, truncated
    assert sizes["plain+64x64.jpg"] == (78, 52) and sizes["plain+32x32.jpg"] == (39, 26)
    assert sizes["turned+64x64.jpg"] == (40, 80) and sizes["turned+32x32.jpg"] == (22, 45)
    assert sizes["small+32x32.jpg"] == (16, 16)
    assert (tmp_path / "out" / "plain+64x64.txt").read_text() == "a caption"


def test_each_copy_is_made_from_the_picture_itself(folder, tmp_path):
    words = [folder, tmp_path / "out", "--save_as_png", "--max_resolution"]
    for resolutions in ("64x64,32x32", "16x16,32x32"):  # in any order
        assert run(resizing, *words, resolutions) == 0
        pixels = np.asarray(Image.open(folder / "plain.png"))
        right = cv2.resize(pixels, (39, 26), interpolation=cv2.INTER_AREA)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "plain+32x32.png")), right)


@pytest.mark.parametrize("side", [513, 520, 535, 1024, 4000])
def test_squares_stay_exact(side):
    assert resizing.size_wh((side, side), 512 * 512) == (512, 512)
    assert resizing.size_wh((4 * side, side), 512 * 512) == (1024, 256)
    assert resizing.size_wh((90_000, 1), 128 * 128) == (38400, 1)
    assert resizing.size_wh((512, 511), 512 * 512) == (512, 511)


@pytest.mark.parametrize("name", resizing.OPENCV + resizing.PILLOW)
def test_interpolations(folder, tmp_path, name):
    words = [folder, tmp_path / "out", "--save_as_png", "--max_resolution", "32x32", "--interpolation", name]
    assert run(resizing, *words) == 0
    pixels = np.asarray(Image.open(folder / "plain.png"))
    if name in resizing.OPENCV:
        right = cv2.resize(pixels, (39, 26), interpolation=getattr(cv2, f"INTER_{name.upper()}"))
    else:
        right = resize(pixels, (39, 26), name)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "plain+32x32.png")), right)


def test_sides_are_cut_in_the_middle(folder, tmp_path):
    words = [folder, tmp_path / "out", "--save_as_png", "--max_resolution", "256x256", "--divisible_by", 16]
    (folder / "below").rmdir()
    assert run(resizing, *words) == 0
    cut = np.asarray(Image.open(tmp_path / "out" / "CAPITALS+256x256.png"))
    pixels = np.asarray(Image.open(folder / "CAPITALS.JPG"))
    assert np.array_equal(cut, pixels[6:54, 5:85])
    assert run(resizing, *words[:-1], 20) == 1  # the smallest is less than that


def test_transparency(folder, tmp_path):
    words = [folder, tmp_path / "out", "--max_resolution", "32x32"]
    assert run(resizing, *words) == 0 and run(resizing, *words, "--save_as_png") == 0
    picture = Image.open(folder / "clear.webp")
    right = np.asarray(picture.resize((32, 32), Image.Resampling.BOX)).astype(int)  # weighs colours by opacity
    made = np.asarray(Image.open(tmp_path / "out" / "clear+32x32.png")).astype(int)
    assert made.shape == (32, 32, 4) and np.abs(made[..., 3] - right[..., 3]).max() <= 1
    assert np.abs(made - right)[:, 6:].max() <= 6  # where there is something to see
    flat = Image.open(tmp_path / "out" / "clear+32x32.jpg")
    assert flat.mode == "RGB" and min(flat.getpixel((0, 16))) > 240  # on white


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{folder}"], "the following arguments are required: dst_img_folder"),
        (["{folder}/none", "o"], "src_img_folder: {folder}/none is no folder"),
        (["{folder}/below", "o"], "{folder}/below holds no pictures"),
        (["{folder}", "{folder}/below/.."], "dst_img_folder: {folder}/below/.. is the folder that is read"),
        (["{folder}", "{folder}/plain.txt/o"], "can't be made"),
        (["{folder}", "o", "--max_resolution", "512"], "--max_resolution: '512' is no resolution; write it as 512x512"),
        (["{folder}", "o", "--max_resolution", "0x5"], "'0x5' is no resolution"),
        (["{folder}", "o", "--divisible_by", "0"], "--divisible_by: 0 is no number of pixels"),
        (["{folder}", "o", "--interpolation", "lancos"], "did you mean lanczos?"),
    ],
)
def test_mistakes_about_resizing(folder, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    before = names(folder)
    assert run(resizing, *(word.format(folder=folder) for word in words)) == 2
    error = capsys.readouterr().err
    assert said.format(folder=folder) in error and error.count("\n") == 1
    assert names(folder) == before and not (tmp_path / "o").exists()


def test_pictures_that_would_become_one(folder, tmp_path, capsys):
    tiny_image((16, 16)).save(folder / "Plain.bmp")
    assert run(resizing, folder, tmp_path / "out") == 2
    assert "Plain.bmp and " in (error := capsys.readouterr().err) and "would become one file; rename one" in error


def test_broken_pictures_are_left_out_and_told(folder, tmp_path, capsys, caplog):
    (folder / "broken.png").write_bytes((folder / "plain.png").read_bytes()[:300])
    assert run(resizing, folder, tmp_path / "out", "--max_resolution", "32x32") == 1
    assert "left out: broken.png (" in caplog.text
    assert "1 of 6 pictures can't be used and were left out: broken.png" in capsys.readouterr().err
    assert "plain+32x32.jpg" in names(tmp_path / "out") and "broken+32x32.jpg" not in names(tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may write anywhere")
def test_folders_that_are_closed(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    assert run(resizing, folder, tmp_path / "out") == 2
    assert "can't be written to; choose another folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- faces

FACE = FoundFace(30, 16, 30, 40, (38, 30), (52, 30))


def find(image: np.ndarray) -> list[FoundFace]:
    """Stands for a detector: two faces in wide pictures, none in others."""
    return [FACE, FoundFace(2, 2, 10, 10, (4, 4), (8, 4))] if image.shape[1] > 85 else []


def cut(folder: Path, out: Path, **options) -> list[str]:
    out.mkdir(exist_ok=True)
    cut_all(PictureFolder.of(str(folder), "--src_dir"), out, FaceOptions(**options), find)
    return names(out)


def test_faces_are_cut_out(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    made = cut(folder, tmp_path / "out", crop_size=(40, 32), min_size=20)
    assert made == ["CAPITALS_0020_0016_0030_0040.png", "plain_0020_0016_0030_0040.png"]
    assert "2 faces written, 3 pictures without one" in caplog.text
    right = np.asarray(Image.open(folder / "plain.png"))[20:52, 25:65]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / made[1])), right)
    face = face_in_name(made[1])  # as training reads it
    assert face is not None and (face.x, face.y, face.width, face.height) == (20, 16, 30, 40)


def test_several_faces(folder, tmp_path):
    both = cut(folder, tmp_path / "both", multiple_faces=True)
    assert [name for name in both if name.startswith("plain")] == [
        "plain_01_0045_0036_0030_0040.png", "plain_02_0007_0007_0010_0010.png",
    ]  # fmt: skip
    assert len(cut(folder, tmp_path / "plain")) == 4  # without numbers, but all of them
    assert len(cut(folder, tmp_path / "large", max_size=40)) == 2  # fewer than 40
    assert len(cut(folder, tmp_path / "none", min_size=41)) == 0


def test_a_box_for_debugging(folder, tmp_path):
    (name, *_) = cut(folder, tmp_path / "out", min_size=20, debug=True)
    pixels = np.asarray(Image.open(tmp_path / "out" / name))
    assert tuple(pixels[16, 45]) == tuple(pixels[36, 30]) == (0, 255, 0)


def test_broken_pictures_among_faces(folder, tmp_path):
    (folder / "broken.png").write_bytes(b"nothing")
    with pytest.raises(LeftOutError, match=r"--src_dir: 1 of 6 pictures .*broken.png"):
        cut(folder, tmp_path / "out")
    assert len(names(tmp_path / "out")) == 4


def test_the_command_names_its_detector(folder, tmp_path):
    words = ["--src_dir", folder, "--dst_dir", tmp_path / "out", "--detector", folder / "plain.txt"]
    result = script("tools/detect_face_rotate.py", *words)
    assert result.returncode == 2 and "--detector: " in result.stderr and "is no YuNet" in result.stderr
    assert result.stderr.strip().count("\n") == 0 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resize_fit": True, "resize_face_size": 64, "crop_size": "64,64"}, "--resize_fit: excludes --resize_face"),
        ({"crop_ratio": "1,2", "resize_face_size": 64}, "--crop_ratio: excludes --resize_face_size"),
        ({"crop_ratio": "1,2", "crop_size": "64,64"}, "--crop_ratio: excludes --crop_size"),
        ({"resize_fit": True}, "--resize_fit: has nothing to fit to; give --crop_size"),
        ({"crop_size": "64"}, "--crop_size: '64' is not of the form 512,512"),
        ({"crop_size": "64,0"}, "--crop_size: '64,0' is no size"),
        ({"crop_ratio": "1,nan"}, "--crop_ratio: '1,nan' is no size"),
        ({"min_size": -1}, "--min_size: -1 is no number of pixels"),
    ],
)
def test_mistakes_about_faces(folder, tmp_path, capsys, options, said):
    words = ["--src_dir", folder, "--dst_dir", tmp_path / "out"]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", value]
    assert run(detect_face_rotate, *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_folders_without_pictures(folder):
    with pytest.raises(OptionError, match="holds no pictures"):
        PictureFolder.of(str(folder / "below"), "--src_dir")
