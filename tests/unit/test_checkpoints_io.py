"""safetensors files: layout equal to the library's, atomic writing, hashes, damaged files."""

from __future__ import annotations

import enum
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save

from library.checkpoints import safetensors_io as io
from library.checkpoints.weights import load_tensors, open_weights
from library.options import OptionError

NETWORK = {
    "m.alpha": torch.tensor(4.0),
    "m.lora_down.weight": torch.arange(6.0).reshape(2, 3),
    "m.lora_up.weight": torch.ones(5, 2),
}
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32,
    torch.float64, torch.int64, torch.float8_e5m2, torch.float8_e4m3fn, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64,
]  # fmt: skip


def test_file_is_byte_equal_to_the_safetensors_library(tmp_path: Path):
    tensors = {f"t{i}": torch.ones(3, 2).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {'a "é"': torch.tensor(4.0), "empty": torch.empty(0), "transposed": torch.arange(6.0).reshape(2, 3).T}
    io.save_file(tensors, tmp_path / "x.safetensors", {"title": 'ü "quoted" \n'})
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "x.safetensors").read_bytes() == save(contiguous, {"title": 'ü "quoted" \n'})


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        max_size=6,
    )
)
def test_any_tensors_survive(tmp_path_factory: pytest.TempPathFactory, content: dict):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    tensors = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in content.items()}
    io.save_file(tensors, path, {"k": "v"})
    read = load_tensors(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert bytes(io.raw_bytes(read[name])) == bytes(io.raw_bytes(tensor))


def test_header_without_reading_tensors(tmp_path: Path):
    io.save_file(NETWORK, tmp_path / "x.safetensors", {"ss_v2": "False"})
    header = io.read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"ss_v2": "False"}
    info = header.tensors["m.lora_down.weight"]
    assert (info.dtype, info.shape, info.end - info.start) == ("F32", (2, 3), 24)
    assert header.data_start % 8 == 0


def test_unaligned_file_of_an_old_writer_is_read(tmp_path: Path):
    data = save(NETWORK)
    length = int.from_bytes(data[:8], "little")
    odd = (length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :]
    (tmp_path / "odd.safetensors").write_bytes(odd)
    read = load_tensors(tmp_path / "odd.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in NETWORK.items())


# ------------------------------------------------------------------------------------------------ hashes


def test_network_hashes_of_the_conformance_vector():
    for metadata in ({}, {"ss_x": "1", "other": "2"}):
        assert io.sshs_hashes(NETWORK, metadata) == (
            "38f2a3f035b648366c9f78dce294db56885a5fca449eb04b1130666a2ef77a87",
            "e3b0c442",
        )


def test_network_hashes_follow_their_definition_on_a_large_file():
    generator = torch.Generator().manual_seed(1)
    tensors = {f"t{i}": torch.randn(300, 400 + i, generator=generator).half() for i in range(6)}
    tensors["b"] = torch.randn(9, generator=generator)
    metadata = {"ss_a": "1", "modelspec.title": "not counted"}
    whole = save(tensors, {"ss_a": "1"})
    start = 8 + int.from_bytes(whole[:8], "little")
    assert io.sshs_model_hash(tensors, metadata) == hashlib.sha256(whole[start:]).hexdigest()
    assert io.sshs_legacy_hash(tensors, metadata) == hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]


def test_model_hashes(tmp_path: Path):
    content = bytes(range(256)) * 5000
    (tmp_path / "m").write_bytes(content)
    assert io.legacy_model_hash(tmp_path / "m") == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert io.file_sha256(tmp_path / "m") == hashlib.sha256(content).hexdigest()
    assert io.legacy_model_hash(tmp_path / "none") == "NOFILE"
    assert io.legacy_model_hash(tmp_path) == "IsADirectory"


# ------------------------------------------------------------------------------------------------ failures


def test_not_finite_is_never_saved_and_the_old_file_stays(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    io.save_file(NETWORK, path)
    before = path.read_bytes()
    for value in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            bad = {"a": torch.ones(100), "b": torch.tensor([1.0, value, 2.0]).to(dtype)}
            with pytest.raises(io.NonFiniteError, match="^b holds NaN or infinity") as caught:
                io.save_file(bad, path)
            assert isinstance(caught.value, OptionError) and caught.value.exit_code == 1
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OptionError, match="0 MB free.* MB are needed and 17 MB are always left"):
        io.save_file(NETWORK, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="can't be written"):
        io.save_file(NETWORK, tmp_path / "file" / "x.safetensors")


def test_interrupted_write_leaves_no_trace(tmp_path: Path):
    def interrupted() -> torch.Tensor:
        raise KeyboardInterrupt

    entries = [io.entry_of("a", torch.ones(3)), io.Entry("b", "F32", (2,), interrupted)]
    with pytest.raises(KeyboardInterrupt):
        io.write_entries(entries, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cut", [4, 60, -5])
def test_truncated_file(tmp_path: Path, cut: int):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(NETWORK)[:cut])
    with pytest.raises(OptionError, match="--flag: .*x.safetensors is (truncated|no safetensors file)"):
        io.read_header(path, "--flag")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated_pickle(tmp_path: Path, share: float):
    torch.save({f"t{i}": torch.randn(20, 20) for i in range(9)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(OptionError, match="^--flag: .*cut.pt is damaged or truncated; copy or download it again$"):
        load_tensors(tmp_path / "cut.pt", "--flag")


def test_foreign_and_missing_files(tmp_path: Path):
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>not found</html>" * 100)
    (tmp_path / "empty.safetensors").write_text("")
    for name in ("page", "empty"):
        with pytest.raises(OptionError, match="is no safetensors file"):
            io.read_header(tmp_path / f"{name}.safetensors")
    with pytest.raises(OptionError, match="does not exist; check the path"):
        io.read_header(tmp_path / "none.safetensors")
    with pytest.raises(OptionError, match="is no file"):
        io.read_header(tmp_path)


def test_written_files_have_the_usual_permissions(tmp_path: Path):
    (tmp_path / "plain").write_text("")
    io.save_file(NETWORK, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert load_file(tmp_path / "x.safetensors")["m.alpha"] == 4


class _Command:
    """Pickled, it is a command that runs when it is loaded."""

    def __init__(self, function: Callable, *words: str) -> None:
        self.words = function, words

    def __reduce__(self):
        return self.words


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(("function", "text"), [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (exec, "import x")])
def test_code_in_a_ckpt_is_named_and_does_not_run(tmp_path, is_zip, function, text):
    file, marker = tmp_path / "evil.ckpt", tmp_path / "ran"
    command = _Command(function, text.format(marker))
    torch.save({"a": torch.ones(2), "b": command}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(OptionError, match=r"^--flag: .*evil\.ckpt holds code that would run when it is loaded"):
        load_tensors(file, "--flag")
    assert not marker.exists()


class _Kind(enum.Enum):
    ONE = 1


def test_objects_of_foreign_classes_are_told(tmp_path):
    extra = {"path": Path("/x"), "kind": _Kind.ONE, "set": {1, 2}, "range": range(3), "slice": slice(1)}
    torch.save({"state_dict": {"a": torch.ones(2)}, **extra}, tmp_path / "x.ckpt")
    with open_weights(tmp_path / "x.ckpt") as weights:
        assert weights.shapes == {"a": (2,)}
        inert = getattr(weights, "inert", ())
    assert f"{_Kind.__module__}._Kind" in inert and any(name.startswith("pathlib") for name in inert)


def odd_pickles() -> dict[str, tuple[dict, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8)
    return {
        "list": ({"state_dict": [1, 2]}, "its state_dict is no dictionary of tensors"),
        "tensor": ({"state_dict": torch.zeros(3)}, "its state_dict is no dictionary of tensors"),
        "none": ({"string_to_param": None}, "its string_to_param is no dictionary of tensors"),
        "number": ({1: torch.zeros(2)}, "its tensor 1 has no text as its name"),
        "bytes": ({b"a": torch.zeros(2)}, "its tensor b'a' has no text as its name"),
        "complex128": ({"q": torch.zeros(2, dtype=torch.complex128)}, "q is of the data type complex128, which is"),
        "quantised": ({"q": quantised}, "q is quantised"),
        "sparse": ({"q": torch.eye(3).to_sparse()}, "q is sparse"),
        "meta": ({"q": torch.zeros(2, device="meta")}, "q has no content"),
    }


@pytest.mark.parametrize("name", ["list", "tensor", "none", "number", "bytes", "complex128", "quantised", "sparse",
                                  "meta"])  # fmt: skip
def test_odd_pickles_are_one_sentence(tmp_path, name):
    content, said = odd_pickles()[name]
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(OptionError, match=f"^--flag: .*odd.pt.*{re.escape(said)}"):
        load_tensors(tmp_path / "odd.pt", "--flag")


def test_parameters_and_hypernetworks_are_read(tmp_path):
    pair = {"linear1.weight": torch.nn.Parameter(torch.ones(2, 2))}
    torch.save({"a": torch.nn.Parameter(torch.ones(2)), 64: (pair, 5), 1: [1, 2]}, tmp_path / "x.pt")
    read = load_tensors(tmp_path / "x.pt")
    assert read.keys() == {"a", "64.0.linear1.weight"} and not any(t.requires_grad for t in read.values())
    io.save_file(read, tmp_path / "x.safetensors")
    with pytest.raises(OptionError, match="data type complex128 can't be written"):
        io.save_file({"a": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "y.safetensors")


# ----------------------------------------------------------------------------------- headers that lie


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def row(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ([], b"", "is no safetensors file: its header can't be read"),
        (b"[" * 100_000, b"", "is no safetensors file: its header can't be read"),
        (b'{"__metadata__":{"a":"\xff"}}', b"", "its header can't be read"),
        (b'{"__metadata__":{"a":"\\ud800"}}', b"", "its header can't be read"),
        ({"__metadata__": ["a"]}, b"", "its metadata are no texts by name"),
        ({"__metadata__": {"a": 1}}, b"", "its metadata are no texts by name"),
        ({"__metadata__": {"a": None}}, b"", "its metadata are no texts by name"),
        (b'{"__metadata__":{"a":"1","a":"2"}}', b"", "its header has a twice"),
        ({"a": 1}, b"", "its header does not describe a"),
        ({"a": {"dtype": "U8", "shape": [2]}}, b"12", "its header does not describe a"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1, 2]}}, b"12", "its header does not describe a"),
        ({"a": row(0, 2, dtype=["U8"])}, b"12", "its header does not describe a"),
        ({"a": row(0, 2, shape="2")}, b"12", "its header does not describe a"),
        ({"a": row(0, 2, dtype="C128")}, b"12", "x.safetensors: a is of the data type C128, which is not known here"),
        ({"a": row(0, 2, shape=[2.0])}, b"12", "are no whole numbers from 0"),
        ({"a": row(0, 2, shape=[True, 2])}, b"12", "are no whole numbers from 0"),
        ({"a": row(0, 2, shape=[-1, -2])}, b"12", "are no whole numbers from 0"),
        ({"a": row(-2, 0, shape=[2])}, b"12", "are no whole numbers from 0"),
        ({"a": row(0, 3, shape=[2])}, b"123", "can't be the bytes 0 to 3"),
        ({"a": row(2, 0, shape=[2])}, b"12", "can't be the bytes 2 to 0"),
        ({"a": row(0, 2), "b": row(1, 3)}, b"123", "b overlaps the tensor before it"),
        ({"a": row(0, 2), "b": row(3, 4)}, b"1234", "b does not follow the tensor before it"),
        ({"a": row(1, 2)}, b"12", "a does not follow the tensor before it"),
        ({"a": row(0, 2)}, b"12345", "is damaged: 3 bytes follow its last tensor"),
        ({}, b"1", "is damaged: 1 bytes follow its last tensor"),
        ({"a": row(0, 9)}, b"12", "is truncated"),
    ],
)
def test_what_the_library_refuses_is_one_sentence(tmp_path: Path, header: object, data: bytes, said: str):
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(OptionError) as caught:
        io.read_header(path, "--flag")
    assert said in str(caught.value) and str(caught.value).startswith(f"--flag: {path}")
    if "twice" not in said:
        with pytest.raises(SafetensorError):
            deserialize(path.read_bytes())


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({}, b""),
        ({"__metadata__": None}, b""),
        ({"__metadata__": {"only": "metadata"}}, b""),
        (b'{"__metadata__":{"a":"\\ud83d\\ude00"}}  ', b""),
        ({"b": row(0, 2), "a": row(2, 3), "none": row(2, 2), "zero": row(0, 0, shape=[4, 0, 2])}, b"123"),
        ({"a": row(0, 2) | {"note": 1}}, b"12"),
    ],
)
def test_what_the_library_reads_is_read(tmp_path: Path, header: object, data: bytes):
    path = raw_file(tmp_path / "x.safetensors", header, data)
    tensors = load_tensors(path)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: info["shape"] for name, info in deserialize(path.read_bytes())
    }


def test_half_a_letter_does_not_stop_a_save(tmp_path: Path):
    """The names of files that are not UTF-8 come with such letters; a run's weights are not lost for them."""
    io.save_file(NETWORK, tmp_path / "x.safetensors", {"title": "caf\udce9"})
    assert io.read_header(tmp_path / "x.safetensors").metadata == {"title": "caf?"}
    with pytest.raises(OptionError, match="tensor name .* can't be written"):
        io.save_file({"\ud800": torch.ones(1)}, tmp_path / "y.safetensors")
