"""metadata_cache.json: written for other programs, never read."""

import errno
import json
from pathlib import Path

import pytest

from library.data.folder_scan import scan_folder
from library.data.info_cache import write_info
from tests.tiny_data import tiny_image, tiny_images


@pytest.fixture
def folder(tmp_path):
    """Two images with captions, one rotated image without."""
    tiny_images(tmp_path / "a", 2, captions=["one, two\nthree", "größe"])
    exif = tiny_image((1, 1)).getexif()
    exif[0x0112] = 6
    tiny_image((40, 24)).save(tmp_path / "a" / "rotated.jpg", exif=exif)
    return tmp_path / "a"


def write(folder):
    write_info(folder, scan_folder(folder, caption_extension=".txt", class_tokens=None).images)
    return folder / "metadata_cache.json"


def test_the_file_is_that_of_the_trade(folder):
    assert json.loads(write(folder).read_text()) == {
        str(folder / "image_000.png"): {"caption": "one, two", "resolution": [64, 64]},
        str(folder / "image_001.jpg"): {"caption": "größe", "resolution": [96, 64]},
        str(folder / "rotated.jpg"): {"caption": "", "resolution": [40, 24]},  # as stored
    }


@pytest.mark.parametrize("content", ["", "[1]", '{"image_000.png": 3}', "\0\xff"])
def test_it_is_written_anew_where_it_says_something_else(folder, content):
    expected = write(folder).read_text()
    before = (folder / "metadata_cache.json").stat()
    after = write(folder).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    (folder / "metadata_cache.json").write_text(content)
    assert write(folder).read_text() == expected


def test_a_folder_that_can_not_be_written(folder, caplog):
    (folder / "metadata_cache.json").mkdir()
    write(folder)
    assert "--cache_info: can't write" in caplog.text
    assert sorted(path.name for path in folder.glob("*.tmp")) == []


def test_a_folder_in_which_nothing_can_be_removed(folder, caplog, monkeypatch):
    """On a read-only disk, removing what is not even there fails with another error than that it is not there."""
    (folder / "metadata_cache.json").mkdir()

    def refuse(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    write(folder)
    assert "--cache_info: can't write" in caplog.text
