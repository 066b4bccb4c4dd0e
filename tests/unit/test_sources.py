"""Folders: which images are found, which captions belong to them, what is said about it."""

import logging

import pytest

from library.data import slow_files, sources
from library.data.folder_scan import scan_folder
from library.data.listing import image_extensions
from library.data.sources import kinds_passed_over, refuse_broken, report_captions
from library.options import OptionError
from tests.tiny_data import tiny_image, tiny_images


def scan(folder, extension=".caption", tokens=None):
    return scan_folder(folder, caption_extension=extension, class_tokens=tokens)


def captions(contents):
    return [image.caption for image in contents.images]


def report(contents, extension=".caption"):
    report_captions([(contents, extension)])


def test_images_are_sorted_and_of_every_case(tmp_path):
    for name in ("b.PNG", "a.Jpg", "c.webp", "notes.txt", "d.gif"):
        tiny_image((8, 8)).save(tmp_path / name, format="PNG")
    (tmp_path / "folder.png").mkdir()
    assert [image.path.rpartition("/")[2] for image in scan(tmp_path).images] == ["a.Jpg", "b.PNG", "c.webp"]
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp"} <= image_extensions()


def test_what_is_no_usable_image_is_told_in_one_line(tmp_path):
    tiny_images(tmp_path / "a", 1)
    for name in ("b.gif", "c.tif", "d.TIF", "e.jfif", "f.heic", "notes.txt", "cache.npz"):
        (tmp_path / "a" / name).write_bytes(b"")
    (tmp_path / "a" / "g.png").mkdir()
    contents = scan(tmp_path / "a")
    assert kinds_passed_over(contents.passed_over * 2) == "1 .gif, 1 .heic, 1 .jfif, 2 .tif, 1 folder named .png"
    assert len(contents.images) == 1 and not contents.broken


def test_a_link_to_nothing_is_a_broken_image(tmp_path):
    tiny_images(tmp_path, 1)
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "good.png").symlink_to(tmp_path / "image_000.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    contents = scan(tmp_path)
    reason = "is a link to a file that is not there"
    assert contents.broken == {str(tmp_path / name): reason for name in ("link.png", "circle.png")}
    assert len(contents.images) == 2


def test_captions_with_their_extension_in_capitals(tmp_path):
    tiny_images(tmp_path, 4, captions=[])
    for name, text in (("image_000.TXT", "capitals"), ("image_001.Txt", "mixed"), ("image_002.txt", "plain")):
        (tmp_path / name).write_text(text)
    (tmp_path / "image_002.TXT").write_text("not this one")
    for asked in (".txt", ".caption", ".TXT"):
        expected = "not this one" if asked == ".TXT" else "plain"
        assert captions(scan(tmp_path, asked)) == ["capitals", "mixed", expected, ""]


def test_sizes_of_files_are_known(tmp_path):
    (path,) = tiny_images(tmp_path, 1)
    assert scan(tmp_path).images[0].num_bytes == path.stat().st_size


def test_the_extension_asked_for_wins(tmp_path):
    tiny_images(tmp_path, 2, captions=["from txt"], extension=".txt")
    tiny_images(tmp_path, 1, captions=["from caption"], extension=".caption")
    assert captions(scan(tmp_path)) == ["from caption", ""]
    assert captions(scan(tmp_path, ".txt")) == ["from txt", "from txt"]


@pytest.mark.parametrize(("asked", "there"), [(".caption", ".txt"), (".txt", ".caption"), (".tags", ".txt")])
def test_other_captions_are_used_when_none_has_the_extension(tmp_path, caplog, asked, there):
    tiny_images(tmp_path, 2, captions=["one", "two"], extension=there)
    contents = scan(tmp_path, asked)
    with caplog.at_level(logging.INFO):
        report(contents, asked)
    assert captions(contents) == ["one", "two"]
    assert [record.message for record in caplog.records] == [
        f"captions: no {asked} files; using the {there} files that are there"
    ]


def test_class_tokens_stand_in_for_missing_captions(tmp_path):
    paths = tiny_images(tmp_path, 3, captions=[])
    paths[0].with_suffix(".caption").write_text("a caption")
    contents = scan(tmp_path, tokens="a dog")
    assert captions(contents) == ["a caption", "a dog", "a dog"]
    assert contents.uncaptioned == tuple(str(path) for path in paths[1:])


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        (b"\xef\xbb\xbfwith a mark \r\nsecond line", "with a mark"),
        ("in utf-16".encode("utf-16"), "in utf-16"),
        ("größe, 猫".encode(), "größe, 猫"),
        (b"\n \n after blank lines\n", "after blank lines"),
        (b"", ""),
    ],
)
def test_caption_encodings(tmp_path, raw, caption):
    (path,) = tiny_images(tmp_path, 1, captions=[])
    path.with_suffix(".caption").write_bytes(raw)
    assert captions(scan(tmp_path, tokens="class")) == [caption]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("größe", "latin-1"), ("a, b", "utf-16-le"), ("a, b", "utf-16-be"), ("a, b", "utf-32"), ("a, b", "utf-32-le")],
)
def test_captions_that_are_not_text(tmp_path, text, encoding):
    (path,) = tiny_images(tmp_path, 1, captions=[])
    path.with_suffix(".caption").write_bytes(text.encode(encoding))
    with pytest.raises(OptionError, match=r"captions: not UTF-8: .*image_000\.caption; save"):
        report(scan(tmp_path))


def test_a_face_position_in_the_name_may_be_missing_in_the_caption(tmp_path):
    folder = tmp_path / "a_b_c_d_e"  # underscores of the folder don't count
    folder.mkdir()
    tiny_image((8, 8)).save(folder / "girl_at_sea_10_20_30_40.png")
    tiny_image((8, 8)).save(folder / "plain.png")
    (folder / "girl_at_sea.caption").write_text("sea")
    assert captions(scan(folder)) == ["sea", ""]


def test_a_slow_disk_is_read_in_threads_to_the_same_end(tmp_path, monkeypatch):
    tiny_images(tmp_path, 9)
    (tmp_path / "image_004.png").write_bytes(b"")
    (tmp_path / "image_005.txt").write_bytes(b"\xff")
    expected = scan(tmp_path)
    monkeypatch.setattr(sources, "READ_TOGETHER", 4)
    monkeypatch.setattr(slow_files, "BETWEEN_LOOKS", 2)
    monkeypatch.setattr(slow_files, "SLOW_SECONDS", -1.0)  # any disk counts as slow
    assert scan(tmp_path) == expected
    assert len(expected.images) == 7 and len(expected.broken) == len(expected.unreadable_captions) == 1


def test_every_broken_image_is_listed(tmp_path):
    tiny_images(tmp_path, 2)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"no image")
    contents = scan(tmp_path)
    assert len(contents.images) == 2
    with pytest.raises(OptionError) as caught:
        refuse_broken(contents.broken)
    for part in ("2 broken images", "empty.png: is empty", "text.jpg: is not an image", "--on_bad_image skip"):
        assert part in str(caught.value)
    refuse_broken({})


def test_all_lines_where_one_is_to_be_drawn(tmp_path):
    tiny_images(tmp_path, 1, captions=["\ufeff\n first \n\n \nsecond\n"])
    (first,) = scan(tmp_path).images
    (every,) = scan_folder(tmp_path, caption_extension=".txt", class_tokens=None, all_lines=True).images
    assert (first.caption, every.caption) == ("first", "first\nsecond")
