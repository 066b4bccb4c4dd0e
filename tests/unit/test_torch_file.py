"""PyTorch's own files, written one tensor at a time: what torch reads, and what other readers look at."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.checkpoints.safetensors_io import Entry, NonFiniteError, entry_of
from library.checkpoints.torch_file import ALIGNMENT, write_torch_file
from library.checkpoints.weights import load_tensors, open_weights

TENSORS = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.randn(5, 2, 1, 1).half(),
    "bf16": torch.randn(7).bfloat16(),
    "ids": torch.arange(77)[None],
    "scalar": torch.tensor(4.6),
    "marker": torch.empty(0),
    "flags": torch.tensor([True, False]),
    "eighth": torch.randn(6).to(torch.float8_e4m3fn),
    "transposed": torch.randn(3, 5).T,
}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    is_equal = torch.equal(left.float(), right.float()) if left.dtype.itemsize == 1 else torch.equal(left, right)
    return left.dtype == right.dtype and left.shape == right.shape and is_equal


def write(path: Path, tensors: dict[str, torch.Tensor], **kwargs) -> Path:
    write_torch_file([entry_of(name, tensor) for name, tensor in tensors.items()], path, **kwargs)
    return path


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_torch_reads_every_kind_of_tensor(tmp_path: Path, mmap: bool, weights_only: bool):
    path = write(tmp_path / "x.ckpt", TENSORS, wrap=lambda tensors: {"state_dict": tensors, "epoch": 3})
    content = torch.load(path, mmap=mmap, weights_only=weights_only)
    assert content["epoch"] == 3 and list(content["state_dict"]) == list(TENSORS)
    for name, tensor in content["state_dict"].items():
        assert same(tensor, TENSORS[name]) and tensor.is_contiguous() and not tensor.requires_grad, name
        if tensor.numel():
            assert tensor.data_ptr() % ALIGNMENT == 0, name


def test_what_is_loaded_can_be_changed_and_saved_by_torch(tmp_path: Path):
    content = torch.load(write(tmp_path / "x.bin", TENSORS), weights_only=True)
    content["weight"].mul_(2)
    torch.save(content, tmp_path / "again.bin")
    assert torch.equal(torch.load(tmp_path / "again.bin", weights_only=True)["weight"], TENSORS["weight"] * 2)


def test_the_archive_is_sound_and_has_only_records_that_every_reader_knows(tmp_path: Path):
    """A widespread user interface refuses files with records of other names than these."""
    with zipfile.ZipFile(write(tmp_path / "x.ckpt", TENSORS)) as archive:
        assert archive.testzip() is None, "checksums"
        for info in archive.infolist():
            assert re.match(r"^([^/]+)/((data/\d+)|version|byteorder|(data\.pkl))$", info.filename)
            assert info.compress_type == zipfile.ZIP_STORED
        assert archive.read("archive/version").strip() == b"3"


def test_equal_models_give_equal_files(tmp_path: Path):
    first, second = (write(tmp_path / name, TENSORS).read_bytes() for name in ("a.ckpt", "b.ckpt"))
    assert first == second


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=12),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64]),
)
def test_any_shapes_come_back(tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype):
    tensors = {str(i): (torch.rand(shape) * 100).to(dtype) for i, shape in enumerate(shapes)}
    path = write(tmp_path_factory.mktemp("any") / "x.ckpt", tensors)
    assert all(same(tensor, tensors[name]) for name, tensor in load_tensors(path).items())
    assert set(open_weights(path).shapes) == set(tensors)


def test_tensors_are_produced_one_at_a_time_in_the_order_of_the_file(tmp_path: Path):
    """Each when the one before it is on its way to the disk, so one is in memory at a time."""
    path, sizes = tmp_path / "x.ckpt", []

    def produce() -> torch.Tensor:
        (partial,) = tmp_path.iterdir()
        sizes.append(partial.stat().st_size)
        return torch.ones(1 << 18)

    write_torch_file([Entry(str(i), "F32", (1 << 18,), produce) for i in range(4)], path)
    assert [round(size / (1 << 20)) for size in sizes] == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_never_saved_and_the_old_file_stays(tmp_path: Path, value: float):
    path = write(tmp_path / "x.ckpt", {"a": torch.ones(3)})
    with pytest.raises(NonFiniteError, match="^b holds NaN or infinity"):
        write(path, {"a": torch.ones(3), "b": torch.tensor([1.0, value])})
    assert os.listdir(tmp_path) == ["x.ckpt"] and load_tensors(path)["a"].sum() == 3


def test_interrupted_write_leaves_no_trace(tmp_path: Path):
    def interrupted() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_torch_file([Entry("b", "F32", (2,), interrupted)], tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == []
