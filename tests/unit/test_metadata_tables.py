"""Metadata files of all three forms: read as a stream, written whole or not at all."""

import io
import json
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data import json_stream
from library.data.config import load_configs
from library.data.dataset import TrainingData
from library.data.json_stream import NoObject, NotJSON, object_entries
from library.data.metadata_tables import image_tables, write_tables
from library.data.options import AugmentOptions, BucketOptions, CaptionOptions, LoaderOptions, SourceOptions
from library.options import OptionError
from tests.tiny_data import tiny_images

TABLES = {
    "a": {"caption": 'größe "x"\n\u2028', "tags": "x, y"},
    "b/ü.png": {"train_resolution": [512, 768]},
    "c": {},
    "d": {"caption": "\U0001f600" * 50_000, "tags": ""},
}


def read(path):
    return {key: table for key, table, _ in image_tables(path, "in_json")}


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".parquet"])
def test_what_is_written_is_read(tmp_path, extension):
    if extension == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"m{extension}"
    assert write_tables(path, TABLES.items(), "out_json") == 4
    assert read(path) == TABLES and list(read(path)) == list(TABLES)
    assert write_tables(path, (), "out_json") == 0 and read(path) == {}
    assert os.listdir(tmp_path) == [path.name]


def test_a_json_file_has_the_bytes_of_the_trades_tools(tmp_path):
    for tables in (TABLES, {"a": {}}, {}):
        write_tables(tmp_path / "m.json", tables.items(), "out_json")
        assert (tmp_path / "m.json").read_bytes() == json.dumps(tables, indent=2).encode()


def test_the_earlier_file_stays_where_the_new_one_fails(tmp_path):
    write_tables(tmp_path / "m.json", TABLES.items(), "out_json")

    def tables():
        yield "x", {}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tables(tmp_path / "m.json", tables(), "out_json")
    assert read(tmp_path / "m.json") == TABLES and os.listdir(tmp_path) == ["m.json"]
    with pytest.raises(OptionError, match="^out_json: can't write .*x/m.json .No such file or directory.; choose"):
        write_tables(tmp_path / "x" / "m.json", TABLES.items(), "out_json")


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "m.parquet"
    with pytest.raises(OptionError, match="^out_json: 'a' has score, for which .*; write .json or .jsonl"):
        write_tables(path, [("a", {"score": 1})], "out_json")
    path.write_bytes(b"no parquet")
    with pytest.raises(OptionError, match="^in_json: .*m.parquet can't be read as Parquet"):
        read(path)
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"file_name": ["a", "b"], "text": ["one", None]}), path)
    assert read(path) == {"a": {"text": "one"}, "b": {}}
    parquet.write_table(pa.table({"caption": ["one"]}), path)
    with pytest.raises(OptionError, match="m.parquet: row 1 names no image; give it image_path"):
        read(path)


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("library.data.metadata_tables.is_installed", lambda name: False)
    (tmp_path / "m.parquet").write_bytes(b"")
    with pytest.raises(OptionError, match="^in_json: a .parquet file needs the package pyarrow; pip install pyarrow"):
        read(tmp_path / "m.parquet")


# ---------------------------------------------------------------------------------------------- the stream

JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    content=st.dictionaries(st.text(max_size=6), JSON, max_size=5),
    chunk=st.integers(1, 40),
    indent=st.none() | st.just(2),
)
@settings(deadline=None)
def test_pieces_of_any_size_make_the_same_object(content, chunk, indent):
    text = json.dumps(content, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        found = list(object_entries(io.StringIO(text)))
    assert {key: value for key, value, _ in found} == content
    for key, _, line in found:
        assert text.split("\n")[line - 1].lstrip(" {").startswith(json.dumps(key)) or indent is None


def test_a_number_may_be_cut_anywhere(monkeypatch):
    for chunk in range(1, 16):
        monkeypatch.setattr(json_stream, "CHUNK", chunk)
        assert [value for _, value, _ in object_entries(io.StringIO('{"a": -1.5e+10}'))] == [-1.5e10]


@given(text=st.text('{}[]",:a1\\u \n-', max_size=20), chunk=st.integers(1, 25))
@settings(deadline=None, max_examples=300)
def test_the_stream_refuses_what_json_refuses(text, chunk):
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        try:
            found = [(key, value) for key, value, _ in object_entries(io.StringIO(text))]
        except (NotJSON, NoObject):
            found = None
    if isinstance(expected, dict):
        assert found is None or dict(found) == expected  # a key that stands twice within is refused
    else:
        assert found is None


def test_memory_stays_flat(tmp_path):
    """Peak memory of reading is that of a piece, not of the file."""
    path = tmp_path / "m.json"
    write_tables(path, ((f"image_{i:06d}", {"caption": "a cat on a sofa " * 20}) for i in range(30_000)), "out_json")
    tracemalloc.start()
    assert sum(1 for _ in image_tables(path, "in_json")) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 10_000_000 > peak


@pytest.mark.parametrize("extension", [".jsonl", ".parquet"])
def test_every_form_gives_the_same_training_data(tmp_path, extension):
    if extension == ".parquet":
        pytest.importorskip("pyarrow")
    tiny_images(tmp_path / "images", 3, captions=[])
    tables = {
        "image_000": {"caption": "größe", "tags": "x"},
        "image_002": {"train_resolution": [64, 128]},
        "image_001": {},
    }
    digests = []
    for path in (tmp_path / "m.json", tmp_path / f"m{extension}"):
        write_tables(path, tables.items(), "out_json")
        source = SourceOptions(str(tmp_path / "images"), in_json=str(path))
        configs = load_configs(source, BucketOptions((64, 64)), CaptionOptions(), AugmentOptions(), LoaderOptions(2))
        digests.append(TrainingData.build(configs, seed=0, on_bad_image="stop").digest())
    assert digests[0] == digests[1]
