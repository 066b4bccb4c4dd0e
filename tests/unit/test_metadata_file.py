"""Metadata files: their two forms, what they say of an image, and where its files are."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.entry_finder import EntryFinder
from library.data.metadata_file import common_train_sizes, read_metadata
from library.options import OptionError
from tests.tiny_data import tiny_image


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def entries_of(tmp_path, content, name="meta.json"):
    return read_metadata(write(tmp_path / name, content), "--in_json")


@pytest.mark.parametrize(
    ("said", "caption", "tags"),
    [
        ({"caption": "a cat", "tags": "cat, grass"}, "a cat, cat, grass", "cat, grass"),
        ({"caption": "a cat"}, "a cat", ""),
        ({"caption": "a cat", "tags": ""}, "a cat", ""),
        ({"caption": None, "tags": "cat, grass"}, "cat, grass", "cat, grass"),
        ({"caption": "", "tags": "cat"}, "cat", "cat"),  # the trade's tool begins such a caption with ", "
        ({}, "", ""),
    ],
)
def test_caption_and_tags_become_one_caption(tmp_path, said, caption, tags):
    (entry,) = entries_of(tmp_path, {"a": said})
    assert (entry.key, entry.joined(", "), entry.tags, entry.train_size) == ("a", caption, tags, None)


def test_tags_join_every_line_that_may_be_drawn_with_the_separator_in_use(tmp_path):
    (entry,) = entries_of(tmp_path, {"a": {"caption": "one line\n\n other line ", "tags": "x; y"}})
    assert entry.joined("; ", all_lines=True) == "one line; x; y\nother line; x; y"
    assert entry.joined(", ") == "one line\n\n other line , x; y"


def test_entries_keep_their_order_and_a_byte_order_mark_is_understood(tmp_path):
    path = tmp_path / "meta.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"b": {}, "a": {"train_resolution": [512, 768]}}).encode())
    assert [(entry.key, entry.train_size) for entry in read_metadata(path, "")] == [("b", None), ("a", (512, 768))]


@pytest.mark.parametrize("name", ["image_path", "file_name", "image_key", "key"])
def test_lines(tmp_path, name):
    lines = [{name: "a.png", "caption": "one"}, {name: "b.png", "text": "two", "tags": "x", "other": 1}]
    found = entries_of(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n", "meta.JSONL")
    assert [(entry.key, entry.joined(", ")) for entry in found] == [("a.png", "one"), ("b.png", "two, x")]


def test_a_line_ends_where_files_end_lines(tmp_path):
    lines = [json.dumps({"key": name, "caption": f"{name}\u2028\x85\x0b"}, ensure_ascii=False) for name in "ab"]
    assert [entry.caption[0] for entry in entries_of(tmp_path, "\r\n".join(lines), "m.jsonl")] == ["a", "b"]


def test_sizes_are_rounded_down_to_what_the_vae_takes(tmp_path):
    found = entries_of(tmp_path, {"a": {"train_resolution": [515, 767]}, "b": {"train_resolution": [64, 64]}})
    assert common_train_sizes(found) == ((64, 64), (512, 760))
    assert common_train_sizes([*found, *entries_of(tmp_path, {"c": {}})]) is None
    assert common_train_sizes([]) == ()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("m.json", "{\n'a': 1}", "m.json: line 2 is not JSON"),
        ("m.json", [], "m.json: is not an object of image keys"),
        ("m.json", {"a": "a cat"}, "m.json: 'a' (line 1): 'a cat' is not a table"),
        ("m.json", {"a": {"caption": 3}}, "m.json: 'a' (line 1): caption 3 is not a text"),
        ("m.json", {"a": {"tags": ["x"]}}, "m.json: 'a' (line 1): tags ['x'] is not a text"),
        ("m.json", {"a": {"train_resolution": 512}}, "m.json: 'a' (line 1): train_resolution 512 is no size"),
        ("m.json", {"a": {"train_resolution": [512, 4]}}, "m.json: 'a' (line 1): train_resolution [512, 4] is no size"),
        ("m.json", {"a": {"train_resolution": [10**9, 64]}}, "is no size; write [width, height]"),
        ("m.jsonl", '{"image_path": "a"}\n{"caption": "b"}', "m.jsonl: line 2 names no image; give it image_path"),
        ("m.jsonl", '{"image_path": "a"}\n\n[', "m.jsonl: line 3 is not JSON"),
        ("m.json", '{"a": {"caption": "one"}, "a": {"caption": "two"}}', "m.json: the key 'a' stands in it twice"),
        (
            "m.json",
            '{"a": {"caption": "half \\ud83d"}}',
            "m.json: 'a' (line 1): caption 'half \\ud83d' has half a character",
        ),
        ("m.jsonl", '{"image_path": 3}', "m.jsonl: line 1 names no image"),
        ("m.jsonl", "\n[1]", "m.jsonl: line 2 names no image"),
        (
            "m.json",
            '{"a": {},\n\n"b": {"tags":\n"x" "y"}}',
            "m.json: line 4 is not JSON (Expecting ',' delimiter), at 'b'",
        ),
        ("m.json", '{"a": {}}\n\n{}', "m.json: line 3 is not JSON (Extra data)"),
        ("m.json", '{"a": {}\n"b": {}}', "m.json: line 2 is not JSON (Expecting ',' delimiter)"),
        ("m.json", '{"a": {"caption": "a\ncat"}}', "m.json: line 1 is not JSON (Invalid control character at), at 'a'"),
        ("m.json", '{"a": {"tags": "x", "tags": "y"}}', "(the key 'tags' stands in it twice), at 'a'"),
        ("m.json", '{"a": {"caption": "', "m.json: line 1 is not JSON (Unterminated string starting at), at 'a'"),
        ("m.json", "", "m.json: is not an object of image keys"),
        ("m.json", '{"a": ' + "[" * 100_000, "m.json: line 1 is not JSON (nested too deeply), at 'a'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, name, content, sentence):
    with pytest.raises(OptionError) as caught:
        entries_of(tmp_path, content, name)
    assert sentence in str(caught.value)


def test_files_that_are_not_there_or_no_text(tmp_path):
    with pytest.raises(OptionError, match="^--in_json: .*m.json' is no file"):
        read_metadata(tmp_path / "m.json", "--in_json")
    (tmp_path / "m.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(OptionError, match="^--in_json: line 1 of .* is not UTF-8; save it as UTF-8"):
        read_metadata(tmp_path / "m.json", "--in_json")


# ---------------------------------------------------------------------------------------------- finding files


@pytest.fixture
def folder(tmp_path):
    """a.png with both kinds of latents, b.webp and b.png, c only as latents, an image with a dot in its name."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("a.png", "b.webp", "b.PNG", "v1.5.jpg", "sub/d.png"):
        tiny_image((8, 8)).save(tmp_path / "images" / name, format="PNG")
    for name in ("a.npz", "a_flip.npz", "c.npz", "sub/d.npz", "a.txt"):
        (tmp_path / "images" / name).write_bytes(b"")
    (tmp_path / "images" / "folder.png").mkdir()
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("key", "image", "npz", "flipped"),
    [
        ("a", "a.png", "a.npz", "a_flip.npz"),
        ("a.png", "a.png", "a.npz", "a_flip.npz"),
        ("b", "b.PNG", None, None),  # the first by name
        ("b.webp", "b.webp", None, None),
        ("c", None, "c.npz", None),
        ("v1.5", "v1.5.jpg", None, None),
        ("sub/d", "sub/d.png", "sub/d.npz", None),
        ("nothing", None, None, None),
        ("folder", None, None, None),
        ("a.txt", None, None, None),
        ("nul\0", None, None, None),
    ],
)
def test_keys_lead_to_files_in_the_folder(folder, key, image, npz, flipped):
    found = EntryFinder(folder).find(key)
    expected = [name and str(folder / name) for name in (image, npz, flipped)]
    assert [found.image, found.npz, found.flipped_npz] == expected


def test_a_key_that_is_a_path_as_it_stands(folder, monkeypatch):
    elsewhere = EntryFinder(folder / "sub")
    found = elsewhere.find(str(folder / "a.png"))
    assert (found.image, found.npz) == (str(folder / "a.png"), str(folder / "a.npz"))
    assert elsewhere.find(str(folder / "c.png")).npz == str(
        folder / "c.npz"
    )  # the image is gone, its latents are there
    monkeypatch.chdir(folder)
    assert elsewhere.find("a.png").image == "a.png" and elsewhere.find("a.png").npz == "a.npz"
    assert elsewhere.find("a").image is None and elsewhere.find("c").npz is None


def test_files_of_the_image_folder_come_before_those_of_the_working_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    for name in ("a.png", "b.npz", "v1.npz", "a.npz", "c.npz", "d.png"):
        (tmp_path / "work" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path / "work")
    finder = EntryFinder(folder)
    for key, image, npz in (("a.png", "a.png", "a.npz"), ("b", "b.PNG", None), ("v1.5", "v1.5.jpg", None)):
        found = finder.find(key)
        assert (found.image, found.npz) == (str(folder / image), npz and str(folder / npz))
    assert finder.find("c").npz == str(folder / "c.npz")
    assert finder.find("d.png").image == "d.png"


def test_a_link_in_a_circle_hides_nothing(folder):
    (folder / "circle.png").symlink_to("circle.png")
    finder = EntryFinder(folder)
    assert finder.find("a").image == str(folder / "a.png") and finder.find("circle").image is None


def test_keys_of_windows_and_of_mac(folder):
    (folder / "caf\u00e9.png").write_bytes(b"")
    finder = EntryFinder(folder)
    for key in ("sub\\d", "sub\\d.png"):
        assert finder.find(key).npz == str(folder / "sub" / "d.npz")
    for key in ("C:\\data\\a.png", "C:/data/a", "\\\\server\\share\\a.png"):
        assert finder.find(key).image == str(folder / "a.png")
    for key in ("cafe\u0301", "cafe\u0301.png"):
        assert finder.find(key).image == str(folder / "caf\u00e9.png")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "caption", "tags", "train_resolution", "image_path", "text"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(content=ANY_JSON | st.text(max_size=60), name=st.sampled_from(["m.json", "m.jsonl"]))
@settings(max_examples=150, deadline=None)
def test_anything_is_read_or_refused_with_a_sentence(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    try:
        entries = entries_of(path.parent, content, name)
    except OptionError as error:
        assert str(error)
    else:
        assert all(isinstance(entry.caption, str) and isinstance(entry.tags, str) for entry in entries)
