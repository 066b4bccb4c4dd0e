"""Columns in place of objects: a million files at some bytes each, read as the objects that they stand for.

Shape letters: N rows.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")

JOINED_TOGETHER = 1 << 14


class Column(Sequence[Item]):
    """A sequence whose items are made when they are asked for; equal to any other of equal items."""

    @abstractmethod
    def at(self, row: int) -> Item:
        """The item of a row in [0, N)."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.at(row) for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(index)
        return self.at(int(row))

    def __iter__(self) -> Iterator[Item]:
        return map(self.at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return self is other or (len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True)))

    __hash__ = None  # type: ignore[assignment]


class Texts(Column[str]):
    """Texts one behind the other, as UTF-8; names of files may hold any bytes."""

    def __init__(self, content: bytes, ends_N: np.ndarray) -> None:
        self.content = content
        self.ends_N = ends_N

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """The texts, taken up some thousand at a time."""
        content, lengths = bytearray(), []
        texts = iter(texts)
        while some := list(islice(texts, JOINED_TOGETHER)):
            joined = "".join(some)
            if joined.isascii():
                lengths.append(np.fromiter(map(len, some), np.int64, len(some)))
                content += joined.encode()
            else:
                encoded = [text.encode("utf-8", "surrogateescape") for text in some]
                lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
                content += b"".join(encoded)
        return cls.by_lengths(bytes(content), np.concatenate([np.empty(0, np.int64), *lengths]))

    @classmethod
    def by_lengths(cls, content: bytes, lengths_N: np.ndarray) -> Texts:
        """Texts of these many bytes each."""
        return cls(content, np.cumsum(lengths_N).astype(np.uint32 if len(content) < 1 << 32 else np.int64))

    def __len__(self) -> int:
        return len(self.ends_N)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice) or index.step not in (None, 1):
            return super().__getitem__(index)
        first, end, _ = index.indices(len(self))
        start = int(self.ends_N[first - 1]) if first else 0
        ends = self.ends_N[first:end].tolist()
        content = self.content[start : ends[-1] if ends else start]
        if not content.isascii():
            return [self.at(row) for row in range(first, end)]
        text = content.decode()
        return [text[a - start : b - start] for a, b in zip([start, *ends], ends, strict=False)]

    def raw(self, row: int) -> bytes:
        """The bytes of a text."""
        return self.content[int(self.ends_N[row - 1]) if row else 0 : int(self.ends_N[row])]

    def at(self, row: int) -> str:
        return self.raw(row).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for row in range(0, len(self), JOINED_TOGETHER):
            yield from self[row : row + JOINED_TOGETHER]

    def some(self, rows: np.ndarray) -> list[str]:
        """The texts of these rows, which ascend."""
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            return self[int(rows[0]) : int(rows[-1]) + 1]
        return list(map(self.at, rows.tolist()))

    def raws(self) -> Iterator[bytes]:
        """The bytes of each text."""
        start = 0
        for row in range(0, len(self), JOINED_TOGETHER):
            for end in self.ends_N[row : row + JOINED_TOGETHER].tolist():
                yield self.content[start:end]
                start = end

    @property
    def lengths_N(self) -> np.ndarray:
        """Bytes of each text."""
        return np.diff(self.ends_N.astype(np.int64), prepend=0)

    def take(self, rows: np.ndarray) -> Texts:
        """The texts of these rows."""
        return Texts.by_lengths(b"".join(map(self.raw, rows.tolist())), self.lengths_N[rows])

    def find(self, text: str) -> int | None:
        """The row of a text, where they are sorted."""
        row = bisect_left(self, text)
        return row if row < len(self) and self.at(row) == text else None


class Paths(Column[str]):
    """Paths of files of one folder: all, or those of the rows given. `base` ends with the separator."""

    def __init__(self, base: str, names: Texts, rows: np.ndarray | None = None) -> None:
        self.base = base
        self.names = names
        self.rows = rows

    def __len__(self) -> int:
        return len(self.names) if self.rows is None else len(self.rows)

    def at(self, row: int) -> str:
        return self.base + self.names.at(row if self.rows is None else int(self.rows[row]))

    def without(self, paths: Iterable[str]) -> Paths:
        """The same, less these, where the names are sorted."""
        gone = [row for path in paths if (row := self.find(path)) is not None]
        rows = np.arange(len(self)) if self.rows is None else self.rows
        return Paths(self.base, self.names, rows[~np.isin(rows, gone)])

    def find(self, path: str) -> int | None:
        """The row of a path among all names of the folder, which are sorted."""
        folder, name = os.path.split(path)
        return self.names.find(name) if os.path.join(folder, "") == self.base else None


class PathsAt(Column[str]):
    """Some of many paths, by their places."""

    def __init__(self, paths: Sequence[str], places: np.ndarray) -> None:
        self.paths = paths
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def at(self, row: int) -> str:
        return self.paths[int(self.places[row])]
