"""metadata_cache.json: what is noted is not read again, what has changed is."""

import json
import os

import pytest

from library.data import sources
from library.data.sources import scan_folder
from tests.tiny_data import tiny_image, tiny_images


def scan(folder, **options):
    return scan_folder(folder, caption_extension=".txt", class_tokens="class", **options)


def noted(folder):
    return json.loads((folder / "metadata_cache.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """Three images with captions of two lines, one rotated image without."""
    tiny_images(tmp_path / "a", 3, captions=["one, two\nthree", "größe"])
    exif = tiny_image((1, 1)).getexif()
    exif[0x0112] = 6
    tiny_image((40, 24)).save(tmp_path / "a" / "rotated.jpg", exif=exif)
    return tmp_path / "a"


@pytest.fixture
def read(monkeypatch):
    """The names of images whose headers were read."""
    names = []
    monkeypatch.setattr(
        sources,
        "read_header",
        lambda path, original=sources.read_header: names.append(os.path.basename(path)) or original(path),
    )
    return names


def test_the_second_scan_reads_nothing_and_finds_the_same(folder, read):
    plain = scan(folder)
    assert not (folder / "metadata_cache.json").exists() and len(read) == 4
    assert scan(folder, cache_info=True) == plain and len(read) == 8
    assert scan(folder, cache_info=True) == plain and len(read) == 8
    assert plain.images[3].size_wh == (24, 40)


def test_the_file_has_the_trades_keys(folder):
    scan(folder, cache_info=True)
    content = noted(folder)
    assert content[str(folder / "image_000.png")].items() >= {"caption": "one, two", "resolution": [64, 64]}.items()
    assert content[str(folder / "rotated.jpg")].items() >= {"caption": "", "resolution": [40, 24]}.items()


def test_what_has_changed_is_read_again(folder, read):
    scan(folder, cache_info=True)
    read.clear()
    tiny_image((96, 80)).save(folder / "image_000.png")
    (folder / "image_001.txt").write_text("another")
    (folder / "rotated.txt").write_text("turned")
    (folder / "image_002.txt").unlink()
    tiny_image((8, 8)).save(folder / "new.png")
    again = scan(folder, cache_info=True)
    assert sorted(read) == ["image_000.png", "image_001.jpg", "image_002.png", "new.png", "rotated.jpg"]
    assert again == scan(folder)
    (folder / "new.png").unlink()
    scan(folder, cache_info=True)
    assert not any("new.png" in key for key in noted(folder))


def test_lines_of_captions_count(folder):
    scan(folder, cache_info=True)
    assert scan(folder, cache_info=True, all_lines=True).images[0].caption == "one, two\nthree"
    assert scan(folder, cache_info=True).images[0].caption == "one, two"


@pytest.mark.parametrize(
    "content",
    ["", "[1]", '{"image_000.png": 3}', '{"image_000.png": {"caption": "old", "resolution": [1, 1]}}', "\0\xff"],
)
def test_files_of_other_programs_and_broken_ones_are_not_trusted(folder, content):
    (folder / "metadata_cache.json").write_text(content)
    assert scan(folder, cache_info=True) == scan(folder)
    assert len(noted(folder)) == 4


def test_broken_images_are_not_noted(folder, caplog):
    (folder / "image_000.png").write_bytes(b"x")
    (folder / "image_001.txt").write_bytes(b"\xff\xfe\xff")
    for _ in range(2):
        found = scan(folder, cache_info=True)
        assert len(found.broken) == 1 and len(found.unreadable_captions) == 1
    assert len(noted(folder)) == 2


def test_a_folder_that_can_not_be_written(folder, caplog):
    (folder / "metadata_cache.json").mkdir()
    assert scan(folder, cache_info=True) == scan(folder)
    assert "--cache_info: can't write" in caplog.text
    assert sorted(path.name for path in folder.glob("*.tmp")) == []
