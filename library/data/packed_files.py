"""Pack files: the latents of many images of one size in one file, read from memory-mapped pages.

A file is a row of records and only ever grows. A record is a header of HEADER bytes (MAGIC, the checksum of all that
follows it, the length of a JSON text, that text, zeros) and the latents, float32 (C, h, w), then those of the mirrored
image where the header says so. The text has the `name` that the image's .npz file would have, its `original_size`, the
time of `writing` in ns and the `fingerprint` of cache_files.py. Of records of one name the one written last counts.

What a killed run leaves at the end is no whole record; the next one that writes cuts it off.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import struct
import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from library.data.cache_files import CacheItem, latent_shape, size_text, unwritable

MAGIC = b"latent1\n"
HEADER = 1024  # bytes
FIXED = struct.Struct("<8sII")  # magic, checksum, length of the text
NUMBER = np.dtype("<f4")


class Record(NamedTuple):
    """Where an image's latents are."""

    file: str
    offset: int  # of the header
    facts: Mapping[str, Any]

    @property
    def has_mirrored(self) -> bool:
        return bool(self.facts["mirrored"])


def pack_name(item: CacheItem, process_index: int = 0, num_processes: int = 1) -> str:
    """The pack that a process writes an item to: beside the image, one for each size."""
    part = "" if num_processes == 1 else f".{process_index}"
    return os.path.join(os.path.dirname(item.npz), f"latents_{size_text(item.placement.bucket_wh)}{part}.pack")


class Packs:
    """The records of the packs beside images, as they are when first asked for."""

    def __init__(self) -> None:
        self._indices: dict[str, list[dict[str, Record]]] = {}  # by what the packs' names begin with
        self._damaged: dict[str, bool] = {}

    def find(self, item: CacheItem) -> Record | None:
        """The record of an item that was written last, in the packs of any process."""
        start = pack_name(item).removesuffix(".pack")
        if start not in self._indices:
            self._indices[start] = [_read_index(file)[0] for file in _packs(start)]
        name = os.path.basename(item.npz)
        records = [index[name] for index in self._indices[start] if name in index]
        return max(records, key=lambda record: record.facts["written"], default=None)

    def may_have_lost(self, item: CacheItem) -> bool:
        """Whether the record of an item may have been in a part of its pack that can't be read."""
        start = pack_name(item).removesuffix(".pack")
        if start not in self._damaged:
            self._damaged[start] = any(
                _read_index(file)[1] < os.path.getsize(file) for file in _packs(start) if not is_foreign(file)
            )
        return self._damaged[start]

    def decoded_before(self, item: CacheItem) -> bool:
        """Whether a record shows that the image, unchanged since, has been decoded to the end once."""
        record = self.find(item)
        try:
            status = os.stat(item.path)
        except OSError:
            return False
        noted = (record.facts["fingerprint"].get(name) for name in ("bytes", "mtime_ns")) if record else ()
        return tuple(noted) == (status.st_size, status.st_mtime_ns)


def _packs(start: str) -> list[str]:
    names = sorted(glob.glob(f"{glob.escape(start)}.*pack"))
    return [name for name in names if name[len(start) :].strip(".0123456789") == "pack" and os.path.isfile(name)]


def is_foreign(file: str) -> bool:
    """Whether there is something that can't have been a pack, not even the beginning of one that a killed run left."""
    try:
        with open(file, "rb") as stream:
            begin = stream.read(HEADER)
    except FileNotFoundError:
        return False
    except OSError:  # a folder, or not for us to read
        return True
    is_empty = not begin.strip(b"\0")  # zeros: what a power cut leaves
    return not (is_empty or MAGIC.startswith(begin[: len(MAGIC)]))


def _read_index(file: str) -> tuple[dict[str, Record], int]:
    """(records by name, where the last whole one ends); checksums are not looked at."""
    records: dict[str, Record] = {}
    offset, size = 0, os.path.getsize(file)
    with open(file, "rb") as stream:
        while offset + HEADER <= size:
            stream.seek(offset)
            facts = _facts(stream.read(HEADER))
            if facts is None or (end := offset + HEADER + _payload(facts)) > size:
                break
            records[facts["name"]] = Record(file, offset, facts)
            offset = end
    return records, offset


def _facts(header: bytes) -> dict[str, Any] | None:
    """What a header says; None for bytes that are none."""
    magic, _, length = FIXED.unpack_from(header)
    if magic != MAGIC or length > HEADER - FIXED.size:
        return None
    try:
        facts = json.loads(header[FIXED.size : FIXED.size + length])
        is_whole = isinstance(facts["name"], str) and isinstance(facts["fingerprint"], dict)
        return facts if is_whole and _payload(facts) > 0 and isinstance(facts["written"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _shape(facts: Mapping[str, Any]) -> tuple[int, int, int]:
    channels, height, width = facts["shape"]
    return int(channels), int(height), int(width)


def _payload(facts: Mapping[str, Any]) -> int:
    """Bytes."""
    channels, height, width = _shape(facts)
    return channels * height * width * NUMBER.itemsize * (2 if facts["mirrored"] else 1)


# ---------------------------------------------------------------------------------------------- reading and writing


def read_record(record: Record, pages: np.ndarray, *, flipped: bool) -> np.ndarray:
    """(C, h, w) of a record, as a view of its file's `pages`."""
    shape = _shape(record.facts)
    count = int(np.prod(shape))
    start = record.offset + HEADER + (count * NUMBER.itemsize if flipped else 0)
    return pages[start : start + count * NUMBER.itemsize].view(NUMBER).reshape(shape)


def is_intact(record: Record, pages: np.ndarray) -> bool:
    """Whether a record's checksum holds."""
    end = record.offset + HEADER + _payload(record.facts)
    _, checksum, _ = FIXED.unpack_from(pages[record.offset : record.offset + FIXED.size].tobytes())
    return end <= len(pages) and zlib.crc32(pages[record.offset + FIXED.size : end].data) == checksum


def pages_of(file: str) -> np.ndarray:
    """A file's bytes, mapped into memory."""
    return np.memmap(file, dtype=np.uint8, mode="r")


class PackWriter:
    """Appends records to the packs of one process. A context; at its end everything is on the disk."""

    def __init__(self, process_index: int, num_processes: int) -> None:
        self.process = process_index, num_processes
        self._open: dict[str, int] = {}  # descriptors

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._open.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._open.clear()

    def append(self, item: CacheItem, latents: Mapping[bool, np.ndarray], fingerprint: Mapping[str, str | int]) -> None:
        """Add an item's latents, by whether they are of the mirrored image; raises OptionError where that fails."""
        facts = {
            "name": os.path.basename(item.npz),
            "written": time.time_ns(),
            "shape": latent_shape(item.placement.bucket_wh),
            "mirrored": True in latents,
            "original_size": item.size_wh,
            "fingerprint": fingerprint,
        }
        text = json.dumps(facts, ensure_ascii=False).encode("utf-8", "surrogateescape")
        assert len(text) <= HEADER - FIXED.size, "names of files have at most 255 bytes"
        payload = b"".join(latents[key].astype(NUMBER).tobytes() for key in sorted(latents))
        rest = text.ljust(HEADER - FIXED.size, b"\0") + payload
        content = FIXED.pack(MAGIC, zlib.crc32(rest), len(text)) + rest
        file = pack_name(item, *self.process)
        end: int | None = None
        try:
            descriptor = self._descriptor(file)
            end = os.fstat(descriptor).st_size
            if os.write(descriptor, content) != len(content):
                raise OSError("the disk is full")
        except OSError as error:
            if end is not None:
                self._cut_off(file, end)
            raise unwritable(file, error.strerror or str(error)) from None

    def _cut_off(self, file: str, end: int) -> None:
        """Take back what was written after `end`; of a pack that then holds nothing, the file."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._open[file], end)
            if end == 0:
                os.close(self._open.pop(file))
                os.remove(file)

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._open[file] = os.open(file, flags, 0o666)
            end = _read_index(file)[1]
            if end < os.path.getsize(file):
                os.ftruncate(self._open[file], end)
        return self._open[file]
