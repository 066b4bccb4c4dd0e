"""The index of a data set: the second start reads nothing again and finds the same; whatever changes is noticed."""

import json
import os
import pickle
import sqlite3

import pytest

from library.data import checked_images, equal_pictures, findings, index, index_columns, lookalikes, sources
from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.index import NAME, DataIndex, Fact
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, LoaderOptions, SourceOptions
from library.options import OptionError
from tests.tiny_data import tiny_image, tiny_images

BUCKETS = BucketOptions((64, 64), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=32)


@pytest.fixture(autouse=True, params=["single facts", "in columns"])
def at_once(monkeypatch, request):
    """Files count as come to rest as soon as they are written; few facts, and many, which are put into columns."""
    monkeypatch.setattr(index, "SETTLED_NS", -(10**10))
    monkeypatch.setattr(index, "ARRANGED_FROM", 1000 if request.param == "single facts" else 1)
    monkeypatch.setattr(index_columns, "PART", 3)


@pytest.fixture
def folder(tmp_path):
    """Four images with captions; two of them are one file twice, one is transparent, one is rotated."""
    folder = tmp_path / "1_cat"
    tiny_images(folder, 2, captions=["one, two\nthree", "größe"])
    (folder / "copy.png").write_bytes((folder / "image_000.png").read_bytes())
    exif = tiny_image((1, 1)).getexif()
    exif[0x0112] = 6
    picture = tiny_image((40, 24), seed=5)
    picture.putalpha(100)
    picture.save(folder / "rotated.png", exif=exif)
    return folder


@pytest.fixture
def read(monkeypatch):
    """The names of files that were read: headers and captions, pixels, contents."""
    names = []

    def watched(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path: names.append(os.path.basename(path)) or original(path))

    watched(sources, "read_header")
    watched(sources, "read_text_file")
    watched(equal_pictures, "_content_hash")
    original = checked_images.find_broken
    monkeypatch.setattr(
        checked_images,
        "find_broken",
        lambda paths, note: original([names.append(os.path.basename(path)) or path for path in paths], note),
    )
    return names


def build(folder, policy="on", **options):
    """Data and findings of one start."""
    captions = CaptionOptions(caption_extension=".txt", data_index=policy, **options)
    configs = load_configs(SourceOptions(str(folder.parent)), BUCKETS, captions, AugmentOptions(), LoaderOptions(2))
    return facts(TrainingData.build(configs, seed=0, on_bad_image="skip"))


def letters(texts):
    return [len(text) for text in texts]


def facts(data):
    """All that a start finds."""
    found = findings.find(
        data.datasets, data.scan, num_processes=1, token_limit=75, count_tokens=letters, counter="letters"
    )
    scan = data.scan
    samples = data._samples
    return {
        "digest": data.digest(),
        "contents": scan.contents,
        "broken": scan.broken,
        "looks": dict(sorted(scan.looks.items())),
        "images": samples.images,
        "order": samples.image_of_sample.tolist(),
        "equal": list(found.equal),
        "captions": found.captions,
        "alike": found.alike,
        "transparent": found.transparent,
        "metadata": data.metadata(),
    }


def test_the_second_start_reads_nothing_and_finds_the_same(folder, read):
    plain = build(folder, "off")
    assert not (folder / NAME).exists() and len(plain["images"]) == 4
    assert plain["equal"] and plain["transparent"] and len(plain["looks"]) == 4
    assert build(folder) == plain and (folder / NAME).exists()
    read.clear()
    assert build(folder) == plain
    assert read == []
    assert build(folder, "off") == plain


CHANGES = {
    "another size": (lambda folder: tiny_image((96, 32)).save(folder / "image_000.png"), "image_000.png image_000.txt"),
    "touched": (lambda folder: os.utime(folder / "image_000.png"), "image_000.png image_000.txt"),
    "moved": (lambda folder: os.replace(folder / "copy.png", folder / "image_001.jpg"), "image_001.jpg image_001.txt"),
    "added": (lambda folder: tiny_image((32, 32)).save(folder / "new.png"), "new.png"),
    "removed": (lambda folder: (folder / "rotated.png").unlink(), ""),
    "caption": (lambda folder: (folder / "image_001.txt").write_text("another"), "image_001.jpg image_001.txt"),
    "no caption": (lambda folder: (folder / "image_001.txt").unlink(), ""),
    "new caption": (lambda folder: (folder / "copy.txt").write_text("now it has one"), "copy.png copy.txt"),
    "broken": (lambda folder: (folder / "image_001.jpg").write_bytes(b"\xff\xd8\xff"), "image_001.jpg"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_read_again_and_nothing_else(folder, read, name):
    change, read_again = CHANGES[name]
    before = build(folder)
    change(folder)
    read.clear()
    found = build(folder)
    assert set(read) == set(read_again.split())
    assert found == build(folder, "off")
    assert (found == before) == (name == "touched")


def test_a_caption_that_has_become_unreadable_is_noticed(folder):
    build(folder)
    (folder / "image_001.txt").write_bytes(b"\xff")
    for _ in range(2):
        with pytest.raises(OptionError, match="not UTF-8"):
            build(folder)


def test_a_replaced_file_of_the_same_size_and_time_is_noticed(folder):
    """As of archives that give all their files one time."""
    path = folder / "image_000.txt"
    build(folder)
    status = path.stat()
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and path.stat().st_size == status.st_size
    assert any(image.caption == "two, two" for image in build(folder)["contents"][0].images)


def test_a_file_that_has_just_changed_is_not_noted(folder, monkeypatch, read):
    monkeypatch.setattr(index, "SETTLED_NS", 10**10)
    build(folder)
    read.clear()
    build(folder)
    assert len(set(read)) == 6  # all images and captions
    assert not (folder / NAME).exists()


def test_lines_of_captions_count(folder):
    build(folder)
    captions = {image.caption for image in build(folder, enable_wildcard=True)["contents"][0].images}
    assert captions == {"one, two\nthree", "größe", "cat"}


def test_files_that_are_gone_are_forgotten(folder):
    build(folder)
    (folder / "rotated.png").unlink()
    build(folder)
    with sqlite3.connect(folder / NAME) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM facts")}
    assert names == {"image_000.png", "image_001.jpg", "copy.png", "image_000.txt", "image_001.txt"}


def test_when_an_index_is_kept(folder, monkeypatch, read):
    build(folder, "auto")
    assert not (folder / NAME).exists()  # a small folder
    monkeypatch.setattr(index, "FILES_FROM", 6)
    monkeypatch.setenv("RANK", "1")
    build(folder, "auto")
    assert not (folder / NAME).exists()  # the first process writes
    monkeypatch.setenv("RANK", "0")
    build(folder, "auto")
    assert (folder / NAME).exists()
    monkeypatch.setattr(index, "FILES_FROM", 100)
    read.clear()
    build(folder, "auto")
    assert read == []  # one that is there is used
    build(folder, "off")
    assert len(set(read)) == 6


STATEMENTS = {
    "other version": "PRAGMA user_version = 99",
    "other values": "UPDATE facts SET value = x'ff'",
    "other columns": "UPDATE columns SET contents = x'ff'",
    "values cut off": "UPDATE columns SET contents = x'ff', lengths = name_lengths * 0",
    "no columns": "UPDATE columns SET stamps = NULL",
    "no table": "DROP TABLE columns",
    "no lengths": "UPDATE lengths SET tokens = x'ff'",
}


@pytest.mark.parametrize("damage", ["no database", "cut off", "a folder", "empty", *STATEMENTS])
def test_an_index_that_can_not_be_used_is_made_anew(folder, read, caplog, damage):
    caplog.set_level("INFO")
    plain = build(folder)
    path = folder / NAME
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage in STATEMENTS:
        with sqlite3.connect(path) as connection:
            connection.execute(STATEMENTS[damage])
    else:
        content = path.read_bytes()
        path.write_bytes({"no database": b"x" * 9999, "cut off": content[: len(content) // 2], "empty": b""}[damage])
    assert build(folder) == plain
    read.clear()
    assert build(folder) == plain
    assert bool(read) == (damage == "a folder")
    assert ("no index is kept in" in caplog.text) == (damage == "a folder")


def test_a_check_that_was_broken_off_is_not_begun_anew(folder, monkeypatch, read):
    plain = build(folder, "off")
    original = lookalikes.Looks.note

    def interrupted(self, path, image):
        if path.endswith("rotated.png"):
            raise KeyboardInterrupt
        return original(self, path, image)

    monkeypatch.setattr(lookalikes.Looks, "note", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(folder)
    monkeypatch.setattr(lookalikes.Looks, "note", original)
    read.clear()
    assert build(folder) == plain
    assert read.count("rotated.png") == 1


def test_the_images_of_metadata_files(folder, tmp_path, read):
    tiny_images(tmp_path / "other", 2, captions=[])
    entries = {"image_000": {"caption": "a"}, str(tmp_path / "other" / "image_001.jpg"): {"tags": "b"}, "copy": {}}
    (tmp_path / "meta.json").write_text(json.dumps(entries))

    def start(policy):
        source = SourceOptions(str(folder), in_json=str(tmp_path / "meta.json"))
        captions = CaptionOptions(data_index=policy)
        configs = load_configs(source, BUCKETS, captions, AugmentOptions(), LoaderOptions(2))
        return facts(TrainingData.build(configs, seed=0, on_bad_image="stop"))

    plain = start("off")
    assert start("on") == plain and len(plain["images"]) == 3
    read.clear()
    assert start("on") == plain and read == []
    assert (folder / NAME).exists() and (tmp_path / "other" / NAME).exists()
    build(folder)
    read.clear()
    assert start("on") == plain and read == []  # facts of a folder serve both ways of naming its images


def test_two_programs_at_once(folder):
    """One that finds the index locked reads the files, and writes when the other is done."""
    plain = build(folder)
    index_ = DataIndex()
    index_.use(folder, "on", 0)
    with sqlite3.connect(folder / NAME, isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "WAIT_SECONDS", 0.01)
            assert build(folder) == plain
        connection.execute("ROLLBACK")
    stamps = {str(folder / "copy.png"): index.stamp_of(str(folder / "copy.png"))}
    assert list(index_.known(Fact.HEADER, stamps)) == list(stamps)


def test_an_index_goes_to_other_processes(folder):
    build(folder)
    index_ = DataIndex()
    index_.use(folder, "on", 0)
    copied = pickle.loads(pickle.dumps(index_))
    path = str(folder / "copy.png")
    assert dict(copied.look_up(Fact.CONTENT, [path])) == dict(index_.look_up(Fact.CONTENT, [path])) != {}


def test_too_many_looks_are_kept_without_their_colours(folder, monkeypatch):
    monkeypatch.setattr(lookalikes, "MOST_COMPARED", 3)
    plain = build(folder, "off")
    assert plain["alike"] == () and len(plain["transparent"]) == 1
    assert sum(not look.colours for look in plain["looks"].values()) == 1
    monkeypatch.setattr(lookalikes, "MOST_COMPARED", 100)
    assert all(look.colours for look in build(folder)["looks"].values())
