"""Prompts written in pictures, and infotext read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.generate.infotext import parse_infotext
from library.generate.options import PictureOptions, PromptOptions
from library.generate.output import ModelNames, encode, metadata
from library.generate.picture_texts import EXIF_FOLDER, USER_COMMENT, picture_texts
from library.generate.prompt_files import prompts_of_pictures, read_prompts
from library.generate.prompt_line import PromptLine, RawLine
from library.generate.request import GenerationRequest, make_requests
from library.options import OptionError

WEB_UI = """a cat, (fluffy:1.2)
in two lines <lora:mine:0.8>
Negative prompt: blurry,
bad
Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 123, Size: 512x768, Model hash: 0123456789, Model: "a, b", \
Clip skip: 2, Lora hashes: "mine: 12ab, other: 34cd", Version: v1.7.0"""


def picture(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key.replace("_", "-"), text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_what_a_web_ui_writes(caplog: pytest.LogCaptureFixture) -> None:
    line = parse_infotext(WEB_UI, "here")
    assert line == PromptLine(
        "a cat, (fluffy:1.2)\nin two lines", "blurry,\nbad", 512, 768, 20, 7.5, (123,), "here", "euler_a", clip_skip=2,
        sigmas="default",
    )  # fmt: skip
    assert "here: it was made with <lora:mine:0.8>; --network_weights names networks" in caplog.text


def test_infotext_may_lack_things(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_infotext("only a prompt", "x") == PromptLine("only a prompt", where="x")
    assert parse_infotext("Negative prompt: bad\nSteps: 3", "x") == PromptLine("", "bad", steps=3, where="x")
    assert parse_infotext("a\nSteps: 3, Sampler: UniPC, Seed: 1", "x").sampler is None
    assert "x: its sampler 'UniPC' is not known here; --sampler takes its place" in caplog.text


@pytest.mark.parametrize("broken", ["Size: 12", "Seed: x", "CFG scale: nan"])
def test_broken_infotext_names_its_place(broken: str) -> None:
    with pytest.raises(OptionError, match=f"^there: {broken.split(':')[0]}: .* can't be read"):
        parse_infotext(f"a\nSteps: 3, {broken}", "there")


def test_prompts_of_pictures_to_start_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [
        picture(tmp_path / "own.png", prompt="a --w 3 {b|c}", negative_prompt="bad", seed="3"),
        picture(tmp_path / "none.png", Title="no prompt"),
        picture(tmp_path / "web.png", parameters=WEB_UI),
    ]
    Image.new("L", (8, 8)).save(tmp_path / "grey.jpg")
    lines = prompts_of_pictures([*paths, tmp_path / "grey.jpg"])
    assert lines == [
        PromptLine("a --w 3 {b|c}", "bad", where=str(paths[0]), turn=0),
        PromptLine("a cat, (fluffy:1.2)\nin two lines", "blurry,\nbad", where=str(paths[2]), turn=2),
    ], "size, seed and all else are those of the flags"
    for name in ("none.png", "grey.jpg"):
        assert f"--image_path: {tmp_path / name} has no prompt in it and is left out" in caplog.text
    with pytest.raises(OptionError, match=r"--image_path: no prompt given, and none in 1 picture; add --prompt"):
        prompts_of_pictures([paths[1]])


def test_a_text_file_is_a_list_or_one_infotext(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\n# b\nSteps: many\n")
    assert read_prompts(path) == [RawLine("a", f"{path}, line 1"), RawLine("Steps: many", f"{path}, line 3")]
    path.write_text(WEB_UI)
    assert [line.prompt for line in read_prompts(path) if isinstance(line, PromptLine)] == [
        "a cat, (fluffy:1.2)\nin two lines"
    ]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".JPEG"])
@pytest.mark.parametrize("prompt", ["a cat", "ein Kätzchen, 猫, 😀", "猫" * 40, ""])
def test_every_format_keeps_its_text(tmp_path: Path, suffix: str, prompt: str) -> None:
    request = GenerationRequest(prompt, "", 64, 64, 3, 7.0, 5, "dpmsolver++")
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(encode(Image.new("RGB", (64, 64)), metadata(request, ModelNames("model, one")), suffix))
    (line,) = read_prompts(path)
    assert isinstance(line, PromptLine)
    assert (line.prompt, line.width, line.steps, line.scale, line.seeds, line.sampler) == (
        prompt, 64, 3, 7.0, (5,), "dpmsolver++",
    )  # fmt: skip


def test_what_this_program_writes_is_read_to_the_letter(tmp_path: Path) -> None:
    request = GenerationRequest("a <lora:text:1>  b", "Steps: 3", 64, 64, 3, 7.0, 5, "lms", 2, 3)
    path = tmp_path / "p.png"
    path.write_bytes(encode(Image.new("RGB", (8, 8)), metadata(request, ModelNames("m", "", "<lora:real:1>")), ".png"))
    (line,) = read_prompts(path)
    assert isinstance(line, PromptLine)
    assert (line.prompt, line.negative_prompt, line.clip_skip, line.windows) == ("a <lora:text:1>  b", "Steps: 3", 2, 3)
    (again,) = make_requests([line], PromptOptions(), PictureOptions())
    assert again == request


@pytest.mark.parametrize("problem", ["Clip skip: 40", "Max embeddings multiples: 0", "Size: 65x64", "Seed: -3"])
def test_infotext_out_of_range_names_its_place(problem: str) -> None:
    line = parse_infotext(f"a\nSteps: 3, {problem}", "there.png")
    with pytest.raises(OptionError, match="^there.png: .* out of range|is not a multiple"):
        make_requests([line], PromptOptions(), PictureOptions())


@pytest.mark.parametrize(
    "comment", [b"UNICODE\0" + "a cat".encode("utf-16-le"), b"ASCII\0\0\0a cat", b"a cat", b"UNICODE\0\0a\0 \0c\0a\0t"]
)
def test_comments_as_other_programs_write_them(tmp_path: Path, comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(EXIF_FOLDER)[USER_COMMENT] = comment
    Image.new("RGB", (8, 8)).save(tmp_path / "p.jpg", exif=exif)
    assert picture_texts(tmp_path / "p.jpg", "--x")["parameters"] == "a cat"
