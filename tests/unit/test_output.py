"""Pictures as files: names, metadata, and that nothing is ever replaced or half written."""

from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.generate.options import OutputOptions
from library.generate.output import ModelNames, PictureWriter, metadata, prepare_folder, replace_file, write_new
from library.generate.request import GenerationRequest
from library.options import OptionError

REQUEST = GenerationRequest(
    prompt="a cät", negative_prompt="ugly", width=16, height=8, steps=20, scale=7.5, seed=42,
    sampler="dpmsolver++", clip_skip=2,
)  # fmt: skip

MODEL = ModelNames("model")


def picture(value: int = 0) -> Image.Image:
    return Image.fromarray(np.full((8, 16, 3), value, dtype=np.uint8))


def write(folder: Path, count: int, **options: bool) -> list[Path]:
    with PictureWriter(folder, OutputOptions(**options), lambda: MODEL) as writer:
        for index in range(count):
            writer.write(picture(index), REQUEST, index % 2)
    return writer.paths


def test_names_by_time_and_seed(tmp_path: Path) -> None:
    before = time.strftime("%Y%m%d%H%M%S")
    (path,) = write(tmp_path, 1)
    assert re.fullmatch(r"im_\d{14}_000_42\.png", path.name)
    assert before <= path.name[3:17] <= time.strftime("%Y%m%d%H%M%S")


def test_equal_names_in_one_second_do_not_meet(tmp_path: Path) -> None:
    paths = write(tmp_path, 6)
    assert len({path.name for path in paths}) == 6
    assert [np.asarray(Image.open(path))[0, 0, 0] for path in paths] == list(range(6))


def test_sequential_names_go_on_where_the_folder_ends(tmp_path: Path) -> None:
    (tmp_path / "im_000007.png").write_bytes(b"mine")
    names = [path.name for path in write(tmp_path, 2, sequential_file_name=True)]
    names += [path.name for path in write(tmp_path, 1, sequential_file_name=True)]
    assert names == ["im_000008.png", "im_000009.png", "im_000010.png"]
    assert (tmp_path / "im_000007.png").read_bytes() == b"mine"


def test_text_chunks_in_order(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    with Image.open(path) as image:
        assert list(image.text.items()) == [
            ("prompt", "a cät"),
            ("seed", "42"),
            ("sampler", "dpmsolver++"),
            ("steps", "20"),
            ("scale", "7.5"),
            ("negative-prompt", "ugly"),
            (
                "parameters",
                "a cät\nNegative prompt: ugly\n"
                "Steps: 20, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 7.5, Seed: 42, Size: 16x8, "
                "Model: model, Clip skip: 2, RNG: CPU, Version: Training scripts for Stable Diffusion",
            ),
        ]


def test_a_model_name_with_separators_is_quoted() -> None:
    assert 'Model: "a, b"' in metadata(REQUEST, ModelNames("a, b"))["parameters"]


def test_each_picture_has_its_own_negative_prompt(tmp_path: Path) -> None:
    requests = [GenerationRequest("a", negative, 16, 8, 1, 7.5, seed=1) for negative in ("first", "second")]
    with PictureWriter(tmp_path, OutputOptions(), lambda: MODEL) as writer:
        for index, request in enumerate(requests):
            writer.write(picture(), request, index)
    assert [Image.open(path).text["negative-prompt"] for path in writer.paths] == ["first", "second"]


def test_pictures_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    (path,) = write(tmp_path, 1)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failing_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptionError, match="--outdir: can't write to .*No space left on device.*; free some space"):
        write_new(tmp_path, itertools.repeat("a.png"), b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_file_can_be_replaced(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        replace_file(tmp_path / "sheet.png", content, "--output_dir")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("sheet.png", b"new")]
    with pytest.raises(OptionError, match="--output_dir: can't write to .*nowhere"):
        replace_file(tmp_path / "nowhere" / "sheet.png", b"new", "--output_dir")


def test_names_of_weights_for_web_user_interfaces() -> None:
    text = metadata(REQUEST, ModelNames("model", "0123456789", "<lora:net:1>"))["parameters"]
    assert text.startswith("a cät <lora:net:1>\nNegative prompt: ugly\n")
    assert "Model hash: 0123456789, Model: model," in text


def test_killed_while_writing_leaves_no_picture(tmp_path: Path) -> None:
    program = (
        "import itertools, os, sys; from pathlib import Path; from library.generate import output;"
        "os.fsync = lambda _: os._exit(9);"
        "output.write_new(Path(sys.argv[1]), itertools.repeat('a.png'), b'data')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == 9
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a.png").write_bytes(b"mine")
    assert write_new(tmp_path, iter(["a.png", "b.png"]), b"data").read_bytes() == b"data"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"mine", "b.png": b"data"}


def test_two_programs_never_share_a_name(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:

        def write_one(number: int) -> Path:
            return write_new(tmp_path, (f"{n}.png" for n in itertools.count()), str(number).encode())

        paths = list(pool.map(write_one, range(64)))
    assert len(set(paths)) == 64
    assert [path.read_bytes() for path in paths] == [str(number).encode() for number in range(64)]
    assert len(list(tmp_path.iterdir())) == 64


def test_the_writer_reports_a_failing_disk(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(OptionError, match="--outdir"), PictureWriter(folder, OutputOptions(), lambda: MODEL) as writer:
        folder.rmdir()
        writer.write(picture(), REQUEST, 0)


def test_a_folder_is_made(tmp_path: Path) -> None:
    assert prepare_folder(tmp_path / "a" / "b", 1).is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="--outdir: can't write to .*; name a folder you may write to"):
        prepare_folder(tmp_path / "file" / "sub", 1)
    with pytest.raises(OptionError, match="MiB left on its disk; free some space"):
        prepare_folder(tmp_path, 2**70)
