"""finetune/*: from captions and tags beside images to a metadata file that can be trained on."""

import json
import logging
import subprocess
import sys

import pytest

from finetune.merge_captions_to_metadata import TOOL as CAPTIONS
from finetune.merge_dd_tags_to_metadata import TOOL as TAGS
from library.cli import metadata_tools
from tests.runs import ROOT
from tests.tiny_data import tiny_image, tiny_images


@pytest.fixture
def folder(tmp_path):
    """Three images with .caption and .txt files."""
    tiny_images(tmp_path / "images", 3, captions=["a young woman", " two lines,\r\nof text\n\n"], extension=".caption")
    tiny_images(tmp_path / "images", 3, captions=["1girl, long_hair"])
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "meta.json"


def written(path):
    return json.loads(path.read_text())


def run(tool, *words):
    return tool.run([str(word) for word in words])


def clean(*words):
    return metadata_tools.clean(None, [str(word) for word in words])


def test_the_whole_chain(folder, out, tmp_path):
    assert run(CAPTIONS, folder, out) == 0
    assert written(out) == {
        "image_000": {"caption": "a young woman"},
        "image_001": {"caption": "two lines,\nof text"},
        "image_002": {"caption": "a young woman"},
    }
    assert run(TAGS, folder, out) == 0  # to what is there
    assert written(out)["image_000"] == {"caption": "a young woman", "tags": "1girl, long_hair"}
    assert clean(out, tmp_path / "clean.json") == 0
    assert written(tmp_path / "clean.json")["image_000"] == {"caption": "a girl", "tags": "1girl, long hair"}
    assert (tmp_path / "clean.json").read_text() == json.dumps(written(tmp_path / "clean.json"), indent=2)


@pytest.mark.parametrize("name", ["merge_captions_to_metadata", "merge_dd_tags_to_metadata", "clean_captions_and_tags"])
def test_as_a_command_from_another_folder(folder, out, name):
    run(CAPTIONS, folder, out)
    first = out if name.startswith("clean") else folder.name
    command = [sys.executable, ROOT / "finetune" / f"{name}.py", first, out.name]
    result = subprocess.run(command, cwd=out.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    result = subprocess.run([*command, "--ful_pth"], cwd=out.parent, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith(f"{name}.py: --ful_pth: unknown flag")


def test_full_paths_of_folders_below(folder, out):
    tiny_images(folder / "below", 1, captions=["deeper"], extension=".caption")
    tiny_images(folder / ".hidden", 1, extension=".caption")
    assert run(CAPTIONS, folder, out, "--full_path", "--recursive") == 0
    paths = ["below/image_000.png", "image_000.png", "image_001.jpg", "image_002.png"]
    assert list(written(out)) == [f"{folder}/{path}" for path in paths]
    assert written(out)[f"{folder}/below/image_000.png"] == {"caption": "deeper"}


def test_entries_of_an_earlier_file_are_kept(folder, out, tmp_path, caplog):
    (tmp_path / "first.jsonl").write_text(
        '{"image_path": "other", "caption": "kept", "score": 5}\n'
        '{"image_path": "image_001", "caption": "old", "tags": "x"}'
    )
    out.write_text('{"not": {"caption": "looked at"}}')
    assert run(CAPTIONS, folder, out, "--in_json", tmp_path / "first.jsonl") == 0
    assert list(written(out)) == ["other", "image_001", "image_000", "image_002"]
    assert written(out)["other"] == {"caption": "kept", "score": 5}
    assert written(out)["image_001"] == {"caption": "two lines,\nof text", "tags": "x"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert run(TAGS, folder, out, "--full_path") == 0
    assert "none of its 4 entries is one of these images: was it made with another --full_path" in caplog.text


@pytest.mark.parametrize("extension", [".jsonl", ".parquet"])
def test_other_forms(folder, tmp_path, extension):
    if extension == ".parquet":
        pytest.importorskip("pyarrow")
    first, second = tmp_path / f"m{extension}", tmp_path / f"c{extension}"
    assert run(CAPTIONS, folder, first) == run(TAGS, folder, first) == clean(first, second) == 0
    assert clean(second, tmp_path / "m.json") == 0
    assert written(tmp_path / "m.json")["image_002"] == {"caption": "a girl", "tags": "1girl, long hair"}


def test_the_extension_and_its_misspelt_name(folder, out):
    assert run(CAPTIONS, folder, out, "--caption_extention", "txt", "--caption_extension", ".caption") == 0
    assert written(out)["image_000"] == {"caption": "1girl, long_hair"}
    assert "--caption_extention" not in TAGS.parser()._option_string_actions


def test_cleaning_into_a_file_of_no_kind(out, tmp_path, capsys):
    assert clean(out, tmp_path / "x.txt") == 2
    assert "ends in .txt, which is no metadata file" in capsys.readouterr().err
    assert not (tmp_path / "x.txt").exists()


def test_the_older_form_of_cleaning(folder, out, tmp_path, caplog):
    run(TAGS, folder, out)
    assert clean(folder, out, tmp_path / "clean.json") == 0
    assert written(tmp_path / "clean.json")["image_000"] == {"tags": "1girl, long hair"}
    assert f"the folder of images ({folder}) is not needed any more" in caplog.text
    assert "3 entries have no caption: image_000, image_001, image_002" in caplog.text


def test_debug_shows_what_is_done(folder, out, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(CAPTIONS, folder, out, "--debug")
    assert f"{folder}/image_000.png: 'a young woman'" in caplog.text
    clean(out, tmp_path / "clean.json", "--debug")
    assert "image_000: caption: 'a young woman' becomes 'a girl'" in caplog.text


# ---------------------------------------------------------------------------------------------- mistakes


def test_images_without_text(folder, out, capsys, caplog):
    (folder / "image_001.caption").unlink()
    assert run(CAPTIONS, folder, out) == 2 and not out.exists()
    told = capsys.readouterr().err
    assert (
        "1 of 3 images without a .caption file: images/image_001.jpg; try --caption_extension .txt (1 are there)"
        in told
    )
    assert run(CAPTIONS, folder, out, "--on_missing_text", "skip") == 0
    assert list(written(out)) == ["image_000", "image_002"]
    assert run(CAPTIONS, folder, out, "--on_missing_text", "empty") == 0
    assert written(out)["image_001"] == {}
    run(TAGS, folder, out)
    assert run(CAPTIONS, folder, out, "--on_missing_text", "empty") == 0
    assert written(out)["image_001"] == {"tags": "1girl, long_hair"}
    assert "1 of 3 images without a .caption file are left out: images/image_001.jpg" in caplog.text


def test_texts_without_an_image_and_empty_ones(folder, out, caplog):
    (folder / "gone.caption").write_text("of no image")
    (folder / "image_001.caption").write_text(" \n")
    assert run(CAPTIONS, folder, out) == 0
    assert written(out)["image_001"] == {"caption": ""}
    assert "1 .caption file without an image: images/gone.caption" in caplog.text
    assert "1 of 3 texts empty" in caplog.text


def test_images_of_one_name(folder, out, caplog):
    tiny_image((8, 8)).save(folder / "image_001.webp")
    assert run(CAPTIONS, folder, out) == 0 and len(written(out)) == 3
    assert "2 images share their names but for the extension" in caplog.text
    assert run(CAPTIONS, folder, out.with_name("full.json"), "--full_path") == 0
    assert len(written(out.with_name("full.json"))) == 4


def test_long_and_strange_texts(folder, out, tmp_path):
    (folder / "image_000.caption").write_text("\ufeffgröße " + "x" * 100_000, encoding="utf-8")
    (folder / "image_001.caption").write_bytes("猫".encode("utf-16"))
    assert run(CAPTIONS, folder, out) == clean(out, tmp_path / "clean.json") == 0
    assert written(tmp_path / "clean.json")["image_000"]["caption"] == "größe " + "x" * 100_000
    assert written(out)["image_001"] == {"caption": "猫"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "out.json"], "train_data_dir: 'nowhere' is not a folder; name the folder of images"),
        (["empty", "out.json"], "train_data_dir: no images in empty; name the folder of images, or add --recursive"),
        (["images", "no/out.json"], "out_json: there is no folder 'no'; make it, or choose another place"),
        (["images", "empty"], "out_json: 'empty' is a folder; name a file in it, such as metadata.json"),
        (
            ["images", "out.txt"],
            "out_json: 'out.txt' ends in .txt, which is no metadata file; use .json, .jsonl or .parq",
        ),
        (["images", "out.json", "--recursive"], "--recursive: finds images of several folders, which may share their"),
        (["images", "out.json", "--in_json", "no.json"], "in_json: 'no.json' is no file; name a .json"),
        (["images", "out.json", "--in_json", "bad.json"], "bad.json: line 2 is not JSON (Expecting ',' delimiter), at"),
        (["images", "out.json", "--in_json", "list.json"], "list.json: 'a' (line 1): 3 is not a table"),
        (["latin", "out.json"], "train_data_dir: not UTF-8: latin/image_000.caption; save these files as UTF-8"),
        (["images"], "the following arguments are required: out_json"),
        (["images", "out.json", "more"], "'more' stands alone"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(folder, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    tiny_images(tmp_path / "latin", 1, captions=[], extension=".caption")
    (tmp_path / "latin" / "image_000.caption").write_bytes(b"gr\xf6\xdfe")
    (tmp_path / "bad.json").write_text('{"a": {"caption": "x"\n"tags": ""}}')
    (tmp_path / "list.json").write_text('{"a": 3}')
    before = sorted(tmp_path.rglob("*"))
    try:
        code = run(CAPTIONS, *words)
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr().err.splitlines()
    assert code == 2 and sentence in told[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_cleaning_what_is_no_metadata(tmp_path, capsys):
    (tmp_path / "m.json").write_text('{"a": {"tags": 5}}')
    assert clean(tmp_path / "m.json", tmp_path / "out.json") == 2
    assert "m.json: 'a' (line 1): tags 5 is not a text" in capsys.readouterr().err
    assert clean(tmp_path / "no.json", tmp_path / "out.json") == 2
    assert "in_json: " in capsys.readouterr().err and not (tmp_path / "out.json").exists()
