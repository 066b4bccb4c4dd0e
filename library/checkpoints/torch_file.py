"""Writing PyTorch's own files (.ckpt, .bin, .pt) one tensor at a time, so that no second copy of a model exists.

`torch.save` needs all tensors at once. The format does not: it is an uncompressed zip archive whose `data.pkl` tells
names, shapes and data types and refers to one record `data/<number>` of plain bytes for each tensor
(torch/serialization.py). What is written here, `torch.load` reads, its weights-only and memory-mapped ways too. The
archive holds only the records that every reader knows since PyTorch 1.6; user interfaces that check names before they
open a file refuse some of the newer ones.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from library.checkpoints.safetensors_io import DTYPES, Entry, atomic_file, checked_bytes

ROOT = "archive"  # the folder in the archive; readers take any
VERSION = b"3\n"
ALIGNMENT = 64  # bytes; so that a file that is mapped into memory gives aligned tensors
LOCAL_HEADER = 30 + 20  # bytes before a record: the format's own, and the field with which zipfile tells 64-bit sizes
PADDING = 0x4246  # "FB": the extra field in which PyTorch's writer puts padding
STORAGES = {  # data types for which the format has a class of storage; the others go as bytes with their type
    "BOOL": "BoolStorage",
    "U8": "ByteStorage",
    "I8": "CharStorage",
    "I16": "ShortStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I32": "IntStorage",
    "F32": "FloatStorage",
    "C64": "ComplexFloatStorage",
    "F64": "DoubleStorage",
    "I64": "LongStorage",
}


def write_torch_file(
    entries: list[Entry], path: Path, wrap: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
) -> None:
    """Write `wrap` of a dictionary of the entries' tensors, atomically; tensors are produced as they are written.

    `wrap` may put the dictionary into another one, beside plain values. Raises as write_entries does.
    """
    tensors = {entry.name: _Tensor(entry, str(index)) for index, entry in enumerate(entries)}
    size = sum(entry.nbytes for entry in entries)
    with atomic_file(path, at_least=size) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        _add(archive, file, "data.pkl", _pickled(wrap(tensors)))
        _add(archive, file, "byteorder", sys.byteorder.encode())
        for tensor in tensors.values():
            _add(archive, file, f"data/{tensor.key}", checked_bytes(tensor.entry))
        _add(archive, file, "version", VERSION)


@dataclass(frozen=True)
class _Tensor:
    """Stands for a tensor while the description is pickled."""

    entry: Entry
    key: str  # of its record


@dataclass(frozen=True)
class _Storage:
    """Stands for the tensor's bytes: what the description refers to by a persistent id."""

    tensor: _Tensor


class _Pickler(pickle.Pickler):
    """Pickles stand-ins as `torch.save` pickles tensors and their storages."""

    def persistent_id(self, obj: Any) -> Any:
        """("storage", class, record, device, number of elements; bytes for one without a class)"""
        if not isinstance(obj, _Storage):
            return None
        import torch

        entry = obj.tensor.entry
        if entry.dtype in STORAGES:
            kind, count = getattr(torch, STORAGES[entry.dtype]), entry.nbytes // DTYPES[entry.dtype][0]
        else:
            kind, count = torch.UntypedStorage, entry.nbytes
        return "storage", kind, obj.tensor.key, "cpu", count

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        import torch
        from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

        place = (_Storage(obj), 0, obj.entry.shape, _contiguous_strides(obj.entry.shape), False, OrderedDict())
        if obj.entry.dtype in STORAGES:
            return _rebuild_tensor_v2, place
        return _rebuild_tensor_v3, (*place, getattr(torch, DTYPES[obj.entry.dtype][1]), None)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _pickled(content: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: bytes | memoryview) -> None:
    """Add a record whose bytes begin at a multiple of ALIGNMENT in the file."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}")  # with the format's first date: equal models give equal files
    begin = file.tell() + LOCAL_HEADER + len(info.filename) + 4  # of the padding
    padding = -begin % ALIGNMENT
    info.extra = struct.pack("<HH", PADDING, padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        record.write(data)
