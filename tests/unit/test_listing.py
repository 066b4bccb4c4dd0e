"""Folders as people have them: hidden files, names in odd bytes, pipes, folders that are closed, dates for repeats."""

import os
import tempfile
import unicodedata
from pathlib import Path

import pytest

from library.data.class_folders import passed_over_folders
from library.data.folder_scan import scan_folder
from library.data.listing import count_images, is_image, listing
from library.data.options import FolderOptions
from library.data.sources import kinds_passed_over, refuse_broken
from library.options import OptionError
from tests.tiny_data import tiny_image, tiny_images
from tests.unit.test_class_folders import load_folder

NOBODY = 65534


def scan(folder):
    return scan_folder(folder, caption_extension=".txt", class_tokens=None)


def test_hidden_files_are_no_images(tmp_path):
    tiny_images(tmp_path / "1_x", 2)
    (tmp_path / "1_x" / "._image_000.png").write_bytes(b"\0\5\x16\7")  # as macOS puts beside files on other disks
    tiny_image((64, 64)).save(tmp_path / "1_x" / ".hidden.jpg", format="PNG")
    (tmp_path / "1_x" / ".notes").write_text("")
    contents = scan(tmp_path / "1_x")
    assert (len(contents.images), contents.broken, count_images(tmp_path / "1_x")) == (2, {}, 2)
    assert kinds_passed_over(contents.passed_over) == "1 hidden .jpg, 1 hidden .png"
    assert is_image("/a/.b/c.png") and not is_image("/a/b/.c.png")
    tiny_images(tmp_path / ".ipynb_checkpoints", 1)
    assert passed_over_folders(tmp_path) == [(tmp_path / ".ipynb_checkpoints", "a hidden folder")]


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_not_utf8_are_listed(tmp_path):
    tiny_images(tmp_path, 1)
    os.rename(tmp_path / "image_000.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    contents = scan(tmp_path)
    assert not contents.images
    with pytest.raises(OptionError, match="(?s)1 broken image; .*.png: its name is not UTF-8: rename it"):
        refuse_broken(contents.broken)
    os.makedirs(os.fsencode(tmp_path) + b"/1_caf\xe9")
    with pytest.raises(OptionError, match="its name is not UTF-8: rename it"):
        load_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_pipe_is_no_link(tmp_path):
    os.mkfifo(tmp_path / "z.png")
    assert listing(tmp_path).broken == {str(tmp_path / "z.png"): "is a pipe and not a file"}


@pytest.mark.parametrize(("of_image", "of_caption"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC")])
def test_captions_are_found_however_accents_are_written(tmp_path, of_image, of_caption):
    tiny_image((8, 8)).save(tmp_path / (unicodedata.normalize(of_image, "café") + ".png"))
    (tmp_path / (unicodedata.normalize(of_caption, "café") + ".TXT")).write_text("a café")
    assert [image.caption for image in scan(tmp_path).images] == ["a café"]


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a cat\u2028sitting\x85on\x0ba\x0cmat\nmore", "a cat\u2028sitting\x85on\x0ba\x0cmat"),
        ("first\rsecond", "first"),
        ("first\r\nsecond", "first"),
    ],
)
def test_a_line_ends_where_files_end_lines(tmp_path, text, caption):
    tiny_images(tmp_path, 1, captions=[""])
    (tmp_path / "image_000.txt").write_bytes(text.encode())
    assert scan(tmp_path).images[0].caption == caption


def test_a_date_is_no_number_of_repeats(tmp_path):
    tiny_images(tmp_path / "20230815_party", 1)
    with pytest.raises(OptionError) as caught:
        load_folder(tmp_path)
    assert "(is 20230815 a date?); rename it, for example to 10_party" in str(caught.value)
    with pytest.raises(OptionError, match="--num_repeats: 10001 is too often"):
        FolderOptions(num_repeats=10_001)
    (tmp_path / "20230815_party").rename(tmp_path / "10000_party")
    assert load_folder(tmp_path).subsets[0].folder.num_repeats == 10_000


@pytest.fixture
def folder():
    """A folder that a user without rights can get at, by such a user where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def as_user():
    """Takes the rights of root away."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0

    def drop():
        if is_root:
            os.seteuid(NOBODY)

    yield drop
    if is_root:
        os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="other permissions there")
def test_folders_that_are_closed(folder, as_user):
    for name in ("2_disc", "1_closed", "lost+found"):
        tiny_images(folder / "all" / name, 2)
    for name in ("1_closed", "lost+found"):
        (folder / "all" / name).chmod(0)
    as_user()
    closed = "can't be looked into (Permission denied)"
    with pytest.raises(OptionError) as caught:
        load_folder(folder / "all")
    assert f"1_closed {closed}; correct its permissions" in str(caught.value)
    with pytest.raises(OptionError) as caught:
        scan(folder / "all" / "1_closed")
    assert closed in str(caught.value)
    assert (folder / "all" / "lost+found", closed) in passed_over_folders(folder / "all")


@pytest.mark.skipif(os.name == "nt", reason="other permissions there")
def test_a_closed_folder_beside_others_is_passed_over(folder, as_user):
    tiny_images(folder / "all" / "2_disc", 2)
    (folder / "all" / "lost+found").mkdir(mode=0)
    as_user()
    assert [subset.image_dir.name for subset in load_folder(folder / "all").subsets] == ["2_disc"]
