"""Tensor files: header reading without torch, lazy tensors, atomic streaming writing.

The writer lays tensors out exactly as the safetensors library does (data types in its order, then names), so files and
hashes are byte-equal to the trade's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from library.checkpoints.safetensors_header import DTYPES, GET_IT_AGAIN, Header, parsed_header
from library.options import OptionError

if TYPE_CHECKING:
    import torch

LAYOUT_RANK = {name: rank for rank, name in enumerate(DTYPES)}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
SPARE_DISK = 16 << 20  # bytes that stay free after a save
HASHED_WINDOW = (0x100000, 0x110000)  # the bytes of a file that older hashes look at
CHUNK = 1 << 20


class NonFiniteError(OptionError):
    """A tensor to be saved holds NaN or infinity, or would in the dtype asked for; nothing was written."""

    exit_code = 1  # of a training run that ends with it: what went wrong is no mistake in the command line
    tool_exit_code = 2  # of a tool: it was given a file that is not sound, or a precision that is too small

    def __init__(self, problem: str, way_out: str = "") -> None:
        super().__init__("", problem, way_out)


class TooLargeError(NonFiniteError):
    """A tensor of finite numbers would hold infinity in the dtype asked for."""


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its description, and a function that produces it when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Callable[[], torch.Tensor]
    is_trusted: bool = False  # copied from another file as it is, whatever it holds

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPES[self.dtype][0]


# ---------------------------------------------------------------------------------------------- reading


def read_header(path: Path | str, where: str = "") -> Header:
    """The header of a safetensors file, read without torch and without touching the tensors.

    Raises OptionError, naming `where` (a flag) if given, for a missing, truncated, damaged or foreign file.
    """
    path = Path(path)
    subject = f"{path}" if not where else f"{where}: {path}"
    if not path.is_file():
        raise OptionError(
            "", f"{subject} is no file" if path.exists() else f"{subject} does not exist", "check the path"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            raise OptionError("", f"{subject} is no safetensors file")
        if 8 + length > size:
            brace = file.read(1) == b"{"
            problem = "is truncated: it ends within its header" if brace else "is no safetensors file"
            raise OptionError("", f"{subject} {problem}", GET_IT_AGAIN if brace else "")
        text = file.read(length)
    return parsed_header(text, 8 + length, size, subject)


# ---------------------------------------------------------------------------------------------- writing


def save_file(tensors: Mapping[str, torch.Tensor], path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file atomically: it appears under its name complete and verified, or not at all.

    Raises OptionError when the folder can't be written or the disk is too full, NonFiniteError for NaN or infinity.
    """
    write_entries([entry_of(name, tensor) for name, tensor in tensors.items()], path, metadata)


def entry_of(name: str, tensor: torch.Tensor) -> Entry:
    """An entry for a tensor that is at hand."""
    return Entry(name, header_dtype(tensor.dtype), tuple(tensor.shape), lambda: tensor)


def header_dtype(dtype: torch.dtype) -> str:
    """torch.float16 -> "F16"; OptionError for one that the format has not."""
    name = str(dtype).removeprefix("torch.")
    found = next((key for key, (_, torch_name) in DTYPES.items() if torch_name == name), None)
    if found is None:
        raise OptionError("", f"tensors of the data type {name} can't be written", "convert them to another precision")
    return found


def write_entries(entries: Iterable[Entry], path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """save_file for tensors that are produced one by one while writing, so that no second copy of a model exists."""
    entries = in_layout_order(entries)
    head = encode_header(entries, metadata)
    total = len(head) + sum(entry.nbytes for entry in entries)
    with atomic_file(path, total) as file:
        file.write(head)
        for entry in entries:
            file.write(checked_bytes(entry))


def watched(entries: Iterable[Entry], done: Callable[[int], object]) -> list[Entry]:
    """The same entries; `done` hears of the bytes of each when it is produced, as a progress bar wants to."""

    def produced(entry: Entry) -> torch.Tensor:
        tensor = entry.produce()
        done(entry.nbytes)
        return tensor

    return [dataclasses.replace(entry, produce=functools.partial(produced, entry)) for entry in entries]


def in_layout_order(entries: Iterable[Entry]) -> list[Entry]:
    """Entries as the safetensors library lays them out: wide data types first, then by name."""
    return sorted(entries, key=lambda entry: (-LAYOUT_RANK[entry.dtype], entry.name))


def encode_header(entries: Iterable[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The length word and header of a file that holds `entries` in this order.

    Letters of metadata that are none, such as the bytes of a file name that is not UTF-8, become question marks.
    """
    content: dict[str, Any] = {}
    if metadata:
        content["__metadata__"] = {_unicode(key): _unicode(text) for key, text in metadata.items()}
    offset = 0
    for entry in entries:
        if _unicode(entry.name) != entry.name:
            raise OptionError("", f"the tensor name {entry.name!r} can't be written", "name the tensor otherwise")
        content[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _unicode(text: str) -> str:
    return text.encode(errors="replace").decode()


def checked_bytes(entry: Entry) -> memoryview:
    """The bytes of an entry's tensor, produced now; raises NonFiniteError for NaN or infinity."""
    tensor = entry.produce()
    if not entry.is_trusted and not is_finite(tensor):
        raise NonFiniteError(f"{entry.name} holds NaN or infinity; the file was not written")
    data = raw_bytes(tensor)
    assert data.nbytes == entry.nbytes, f"{entry.name}: {data.nbytes} bytes produced, {entry.nbytes} announced"
    return data


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is a finite number; one reduction, for speed."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # float8 has no reductions
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def rounded(tensor: torch.Tensor, dtype: torch.dtype, what: str, flag: str = "--save_precision") -> torch.Tensor:
    """The tensor as `dtype`; TooLargeError, naming `what` it is and the `flag` to change, where that is too small."""
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not is_finite(cast) and is_finite(tensor):
        problem = f"{what} is too large for {str(dtype).removeprefix('torch.')}"
        raise TooLargeError(problem, f"use {flag} bf16 or float")
    return cast


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor in memory order, as the file holds them."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


@contextlib.contextmanager
def atomic_file(path: Path | str, size: int | None = None, *, at_least: int = 0) -> Iterator[BinaryIO]:
    """A file that appears under `path` when the block ends, flushed to disk, and leaves no trace when it fails.

    `size` in bytes, if known, is checked against the free disk space first and against the file afterwards; `at_least`
    is the space to look for where the size is only estimated.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_disk_space(path.parent, size or at_least)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    except OSError as error:
        raise OptionError("", f"{path} can't be written: {error.strerror}", "choose another output folder") from None
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        written = temporary.stat().st_size
        if size is not None and written != size:
            raise OSError(f"{path}: {written:,} bytes on the disk, {size:,} were written")
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def require_disk_space(folder: Path, size: int) -> None:
    """Raise OptionError unless `size` bytes fit on the disk of `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_DISK:
        problem = (
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, {size / 1e6:,.1f} MB are needed "
            f"and {SPARE_DISK / 1e6:,.0f} MB are always left"
        )
        raise OptionError("", problem, "free some space or choose another output folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_to_disk(place: Path) -> None:
    """Make a file, or the names in a folder, last through a power cut, where the system can (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ----------------------------------------------------------------------------------------------- hashes


def sshs_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """(sshs_model_hash, sshs_legacy_hash) of a network file with these tensors; only ss_* metadata count.

    The first is the SHA-256 of all bytes after the header; the second the first 8 digits of the SHA-256 of the
    bytes 0x100000 to 0x110000 of the whole file.
    """
    entries = in_layout_order(entry_of(name, tensor) for name, tensor in tensors.items())
    head = encode_header(entries, only_ss(metadata))
    model_hash, window = hashlib.sha256(), ByteWindow(*HASHED_WINDOW)
    window.add(head)
    for entry in entries:
        data = raw_bytes(tensors[entry.name])
        model_hash.update(data)
        window.add(data)
    return model_hash.hexdigest(), hashlib.sha256(window.content).hexdigest()[:8]


def only_ss(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that the hashes of network files count."""
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


class ByteWindow:
    """The bytes between two offsets of a stream."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.offset, self.content = start, end, 0, b""

    def add(self, data: bytes | memoryview) -> None:
        low, high = max(self.start - self.offset, 0), min(self.end - self.offset, len(data))
        if low < high:
            self.content += bytes(data[low:high])
        self.offset += len(data)


def sshs_model_hash(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """The hash by which user interfaces recognise a network file."""
    return sshs_hashes(tensors, metadata)[0]


def sshs_legacy_hash(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """The older, short hash of a network file."""
    return sshs_hashes(tensors, metadata)[1]


def legacy_model_hash(path: Path | str) -> str:
    """The short hash of a model file, over 0x10000 bytes from 0x100000 on; "NOFILE" or "IsADirectory" without one."""
    try:
        with open(path, "rb") as file:
            file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    except FileNotFoundError:
        return "NOFILE"
    except (IsADirectoryError, PermissionError):
        return "IsADirectory"


def network_hash(path: Path | str) -> str:
    """The hash by which user interfaces recognise a network file: the noted one, or that of all behind the header."""
    if Path(path).suffix.lower() != ".safetensors":
        return file_sha256(path)
    header = read_header(path)
    return header.metadata.get("sshs_model_hash") or _digest(path, header.data_start)


def _digest(path: Path | str, start: int = 0) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def file_sha256(path: Path | str) -> str:
    """The SHA-256 of a whole file, in hexadecimal digits; a file that has not changed is read once."""
    status = os.stat(path)
    return _sha256(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _sha256(path: str, size: int, changed_ns: int) -> str:
    return _digest(path)
