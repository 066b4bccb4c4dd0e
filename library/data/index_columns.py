"""The facts of an index in columns: a million are read and compared in a second.

A part has some ten thousand facts of one kind, sorted by the names of their files: the names, the files' stamps and the
values, each as one piece of memory. What stands in columns stands among the single facts as well, where a file is
looked up by its name.

Shape letters: N facts of a part, or files of a folder; M of these that match.
"""

from __future__ import annotations

import sqlite3
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from library.data.columns import Texts

COLUMNS_TABLE = "CREATE TABLE columns (kind INTEGER, part INTEGER, names BLOB, name_lengths BLOB, stamps BLOB, " \
    "contents BLOB, lengths BLOB, PRIMARY KEY (kind, part))"  # fmt: skip
ARRANGED_FROM = 1000  # new facts: below, looking them up is as quick
PART = 1 << 15  # facts


class Part(NamedTuple):
    """Some facts of one kind."""

    names: Texts
    stamps_N3: np.ndarray  # int64
    values: Texts

    def fixed(self, width: int) -> np.ndarray | None:
        """(N, width) uint8: the values, if each has this many bytes."""
        if len(self.values.content) != width * len(self.names) or (self.values.lengths_N != width).any():
            return None
        return np.frombuffer(self.values.content, np.uint8).reshape(-1, width)


class Match(NamedTuple):
    """Facts of a part that hold: they are about files that have not changed."""

    part: Part
    rows_M: np.ndarray  # of the part
    files_M: np.ndarray  # rows of the files, ascending
    num_named: int  # facts of the part whose file is there, whether changed or not


def arrange(
    connection: sqlite3.Connection,
    kinds: Iterable[int],
    shortened: Mapping[int, tuple[int, int]] = MappingProxyType({}),
) -> None:
    """Put all facts into columns anew, in a transaction of the caller's.

    `shortened` says by kind how many facts are kept whole, and how many bytes of each of the others.
    """
    connection.execute("DELETE FROM columns")
    for kind in kinds:
        query = "SELECT name, bytes, modified, changed, value FROM facts WHERE kind=? ORDER BY name"
        cursor, number = connection.execute(query, (kind,)), 0
        num_whole, length = shortened.get(kind, (sys.maxsize, 0))
        while rows := cursor.fetchmany(PART):
            names = Texts.of(row[0] for row in rows)
            values = [row[4] if isinstance(row[4], bytes) else b"" for row in rows]
            values = values if number * PART < num_whole else [value[:length] for value in values]
            blobs = (
                names.content,
                names.lengths_N.tobytes(),
                np.array([row[1:4] for row in rows], np.int64).tobytes(),
                b"".join(values),
                np.fromiter(map(len, values), np.int64, len(values)).tobytes(),
            )
            connection.execute("INSERT INTO columns VALUES (?, ?, ?, ?, ?, ?, ?)", (kind, number, *blobs))
            number += 1


def parts_of(connection: sqlite3.Connection, kind: int) -> Iterator[Part]:
    """The columns of one kind, part by part. Raises sqlite3.Error, and ValueError for what is damaged."""
    query = "SELECT names, name_lengths, stamps, contents, lengths FROM columns WHERE kind=? ORDER BY part"
    for row in connection.execute(query, (int(kind),)):
        if not all(isinstance(blob, bytes) for blob in row):
            raise ValueError("no columns")
        names, values = _texts(row[0], row[1]), _texts(row[3], row[4])
        stamps_N3 = np.frombuffer(row[2], np.int64).reshape(-1, 3)
        if not len(names) == len(values) == len(stamps_N3):
            raise ValueError("columns of unequal length")
        yield Part(names, stamps_N3, values)


def _texts(content: bytes, lengths: bytes) -> Texts:
    lengths_N = np.frombuffer(lengths, np.int64)
    if (lengths_N < 0).any() or lengths_N.sum() != len(content):
        raise ValueError("columns of unequal length")
    return Texts.by_lengths(content, lengths_N)


def matches(parts: Iterable[Part], names: Sequence[str], stamps_N3: np.ndarray) -> Iterator[Match]:
    """The facts that hold of files, by part; `names` of the files are sorted, `stamps_N3` are theirs now."""
    for part in parts:
        of_part = list(part.names)
        if not of_part:
            continue
        first, end = bisect_left(names, of_part[0]), bisect_right(names, of_part[-1])
        here = list(names[first:end])
        if here == of_part:
            rows, files = np.arange(len(of_part)), np.arange(first, end)
        else:
            row_of = {name: row for row, name in enumerate(of_part)}
            found = [(row_of[name], first + place) for place, name in enumerate(here) if name in row_of]
            rows, files = np.array(found, np.int64).reshape(-1, 2).T
        holds = (part.stamps_N3[rows] == stamps_N3[files]).all(axis=1)
        yield Match(part, rows[holds], files[holds], len(rows))
