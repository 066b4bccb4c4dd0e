"""The index of a data set: what was read of its files, kept in a hidden SQLite file in each folder of images.

A fact holds as long as its file has the size and the times (of modification and of change) that it had when the fact
was noted; times that lie too close to the reading to show a later change are not noted at all. An index is a note of
what the files say and nothing else: without it, or with one that is damaged, the same is read from the files again.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from enum import IntEnum
from itertools import chain
from pathlib import Path

import numpy as np

from library.data.columns import Texts
from library.data.index_columns import ARRANGED_FROM, COLUMNS_TABLE, Match, arrange, matches, parts_of
from library.data.slow_files import FileCalls

logger = logging.getLogger(__name__)

NAME = ".image_index.sqlite3"
VERSION = 2  # goes up with every change to what facts mean; an index of another version is made anew
FILES_FROM = 1000  # in a folder: below, reading is as quick
SETTLED_NS = 2_000_000_000  # of age: file systems keep times to 2 s or better, and a younger file may change unseen
NOTED_TOGETHER = 4096
LOOKS_IN_FULL = 200_000  # pictures that are compared by their looks; of more, columns keep the transparency alone
ASKED_TOGETHER = 900  # values in one query; old versions of SQLite take no more than 999
WAIT_SECONDS = 10.0  # for another program that is writing

Stamp = tuple[int, int, int]  # bytes, time of modification, time of change of the file or its name, in ns
FACTS_TABLE = "CREATE TABLE facts (kind INTEGER, name TEXT, bytes INTEGER, modified INTEGER, changed INTEGER, " \
       "value BLOB, PRIMARY KEY (kind, name)) WITHOUT ROWID"  # fmt: skip
LENGTHS_TABLE = "CREATE TABLE lengths (counter TEXT PRIMARY KEY, hashes BLOB, tokens BLOB)"  # of texts
STATE_TABLE = "CREATE TABLE state (unarranged INTEGER)"  # facts that are in no columns yet


class Fact(IntEnum):
    """What can be known of a file. The numbers stand in index files."""

    HEADER = 1  # of an image
    CAPTION = 2  # text of a caption file
    LOOK = 3  # of an image that was decoded to its end
    CONTENT = 4  # hash of the file


def stamp_of(path: str) -> Stamp | None:
    """None for a file that can't be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def stamps_of(base: str, names: Sequence[str]) -> np.ndarray:
    """(N, 3) int64: the stamps of files of one folder; -1 for what can't be looked at."""
    stamps_N3 = np.empty((len(names), 3), np.int64)
    with _opened(base) as look, FileCalls() as calls:
        for start in range(0, len(names), NOTED_TOGETHER):
            found = calls.results(look, names[start : start + NOTED_TOGETHER])
            stamps_N3[start : start + len(found)] = np.fromiter(chain.from_iterable(found), np.int64).reshape(-1, 3)
    return stamps_N3


@contextmanager
def _opened(base: str) -> Iterator[Callable[[str], Stamp]]:
    """Gives the stamp of a file by its name; where a system can, the folder's path is followed only once."""
    folder = os.open(base, os.O_RDONLY) if os.stat in os.supports_dir_fd else None
    prefix = base if folder is None else ""

    def look(name: str) -> Stamp:
        try:
            status = os.stat(prefix + name, dir_fd=folder)
        except OSError:
            return -1, -1, -1
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    try:
        yield look
    finally:
        if folder is not None:
            os.close(folder)


class FolderIndex:
    """The index of one folder. Its file is opened for each question and closed again."""

    def __init__(self, folder: str, *, writes: bool) -> None:
        self.path = os.path.join(folder, NAME)
        self.writes = writes
        self._pending: list[tuple[int, str, int, int, int, bytes]] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "writes": self.writes, "_pending": []}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def known(self, fact: Fact, stamps: Mapping[str, Stamp]) -> dict[str, bytes]:
        """The facts that hold of the files of these names."""
        if not os.path.exists(self.path):
            return {}
        try:
            with closing(self._connected("ro")) as connection:
                return dict(_holding(connection, fact, stamps)) if _version(connection) == VERSION else {}
        except sqlite3.Error as error:
            logger.debug("%s can't be read (%s)", self.path, error)
            return {}

    def note(self, fact: Fact, name: str, stamp: Stamp | None, value: bytes, since: int) -> None:
        """Keep a fact that was read after `since` (time.time_ns()), if its file had come to rest by then."""
        if stamp is None or not self.writes or max(stamp[1:]) > since - SETTLED_NS:
            return
        with self._lock:
            self._pending.append((int(fact), name, *stamp, value))
            is_enough = len(self._pending) >= NOTED_TOGETHER
        if is_enough:
            self.flush()

    def flush(self) -> None:
        """Write what was noted."""
        with self._lock:
            rows, self._pending = self._pending, []
            if rows and self.writes:
                self._write(rows)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget files that are gone; `names` are all that the folder holds."""
        if not self.writes or not os.path.exists(self.path):
            return
        there = frozenset(names)
        try:
            with closing(self._connected("rw")) as connection:
                if _version(connection) == VERSION:
                    rows = connection.execute("SELECT DISTINCT name FROM facts WHERE kind IN (1, 2)")
                    gone = [(name,) for (name,) in rows if name not in there]
                    connection.execute("BEGIN IMMEDIATE")
                    with connection:
                        connection.executemany("DELETE FROM facts WHERE name=? AND kind IN (1, 2, 3, 4)", gone)
                        connection.execute("UPDATE state SET unarranged = unarranged + ?", (len(gone),))
        except sqlite3.Error as error:
            logger.debug("%s can't be cleared (%s)", self.path, error)

    @property
    def num_unarranged(self) -> int | None:
        """Facts that were added or forgotten since they were put into columns; None where there is no index."""
        if not os.path.exists(self.path):
            return None
        try:
            with closing(self._connected("ro")) as connection:
                return _unarranged(connection) if _version(connection) == VERSION else None
        except sqlite3.Error as error:
            logger.debug("%s can't be read (%s)", self.path, error)
            return None

    def matches(self, fact: Fact, names: Sequence[str], stamps_N3: np.ndarray) -> Iterator[Match]:
        """The facts in columns that hold of the files of these names, which are sorted; see `index_columns.matches`."""
        if not os.path.exists(self.path):
            return
        try:
            with closing(self._connected("ro")) as connection:
                if _version(connection) == VERSION:
                    yield from matches(parts_of(connection, fact), names, stamps_N3)
        except (sqlite3.Error, ValueError) as error:
            logger.debug("%s can't be read (%s)", self.path, error)

    def lengths(self, counter: str) -> tuple[np.ndarray, np.ndarray]:
        """(hashes of texts, uint64, ascending; their tokens, int32), as far as they were counted before."""
        nothing = np.empty(0, np.uint64), np.empty(0, np.int32)
        if not os.path.exists(self.path):
            return nothing
        try:
            with closing(self._connected("ro")) as connection:
                query = "SELECT hashes, tokens FROM lengths WHERE counter=?"
                row = connection.execute(query, (counter,)).fetchone() if _version(connection) == VERSION else None
                found = (np.frombuffer(row[0], np.uint64), np.frombuffer(row[1], np.int32)) if row else nothing
                return found if len(found[0]) == len(found[1]) else nothing
        except (sqlite3.Error, ValueError, TypeError) as error:
            logger.debug("%s can't be read (%s)", self.path, error)
            return nothing

    def keep_lengths(self, counter: str, hashes: np.ndarray, tokens: np.ndarray) -> None:
        """Keep the tokens of texts, in place of what was kept."""
        if not self.writes or not os.path.exists(self.path):
            return
        row = (counter, hashes.astype(np.uint64).tobytes(), tokens.astype(np.int32).tobytes())
        try:
            with closing(self._connected("rw")) as connection:
                if _version(connection) == VERSION:
                    connection.execute("INSERT OR REPLACE INTO lengths VALUES (?, ?, ?)", row)
        except sqlite3.Error as error:
            logger.debug("%s can't be written (%s)", self.path, error)

    def arrange(self) -> None:
        """Put all facts into columns, if many came since that was done."""
        if not self.writes or (self.num_unarranged or 0) < ARRANGED_FROM:
            return
        try:
            with closing(self._connected("rw")) as connection:
                connection.execute("BEGIN IMMEDIATE")
                with connection:
                    arrange(connection, list(map(int, Fact)), {int(Fact.LOOK): (LOOKS_IN_FULL, 1)})
                    connection.execute("UPDATE state SET unarranged = 0")
        except sqlite3.Error as error:
            logger.debug("%s can't be arranged (%s)", self.path, error)

    def _write(self, rows: Sequence[tuple[int, str, int, int, int, bytes]], *, anew: bool = False) -> None:
        try:
            with closing(self._connected("rwc")) as connection:
                connection.execute("BEGIN IMMEDIATE")
                with connection:
                    if _version(connection) != VERSION:
                        _create(connection)
                    connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?, ?)", rows)
                    connection.execute("UPDATE state SET unarranged = unarranged + ?", (len(rows),))
        except sqlite3.OperationalError as error:
            self.writes = False
            logger.info("no index is kept in %s (%s): the next start reads its files again", self.path, error)
        except sqlite3.DatabaseError:  # damaged, or no index at all
            with suppress(OSError):
                os.remove(self.path)
            if not anew:
                self._write(rows, anew=True)

    def _connected(self, mode: str) -> sqlite3.Connection:
        address = f"{Path(self.path).absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(address, timeout=WAIT_SECONDS, isolation_level=None, uri=True)


def _holding(connection: sqlite3.Connection, fact: Fact, stamps: Mapping[str, Stamp]) -> Iterator[tuple[str, bytes]]:
    names = list(stamps)
    for start in range(0, len(names), ASKED_TOGETHER):
        chunk = names[start : start + ASKED_TOGETHER]
        marks = ",".join("?" * len(chunk))
        query = f"SELECT name, bytes, modified, changed, value FROM facts WHERE kind=? AND name IN ({marks})"
        for name, *stamp, value in connection.execute(query, (int(fact), *chunk)):
            if tuple(stamp) == stamps[name] and isinstance(value, bytes):
                yield name, value


def _create(connection: sqlite3.Connection) -> None:
    for table in ("facts", "columns", "lengths", "state"):
        connection.execute(f"DROP TABLE IF EXISTS {table}")
    for statement in (FACTS_TABLE, COLUMNS_TABLE, LENGTHS_TABLE, STATE_TABLE, "INSERT INTO state VALUES (0)"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _unarranged(connection: sqlite3.Connection) -> int:
    return connection.execute("SELECT unarranged FROM state").fetchone()[0]


def _version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


class DataIndex:
    """The indexes of the folders of a run, by paths of files. Files of other folders are unknown to it."""

    def __init__(self) -> None:
        self._folders: dict[str, FolderIndex] = {}
        self._seen: dict[str, tuple[Texts, np.ndarray]] = {}  # images and their stamps, by folder

    def use(self, folder: Path | str, policy: str, num_files: int) -> None:
        """From now on, keep an index of a folder: `policy` is that of --data_index.

        With "auto", one that is there is read, and one of a large folder is written. Of several processes the first
        one writes.
        """
        folder = os.path.dirname(os.path.join(folder, NAME))
        is_first = os.environ.get("RANK", "0") == "0"
        writes = policy == "on" or (policy == "auto" and num_files >= FILES_FROM)
        known = self._folders.get(folder)
        if policy != "off":
            self._folders[folder] = FolderIndex(folder, writes=(writes or bool(known and known.writes)) and is_first)

    def has(self, path: str) -> bool:
        return os.path.dirname(path) in self._folders

    def known(self, fact: Fact, stamps: Mapping[str, Stamp | None]) -> dict[str, bytes]:
        """By path: the facts that hold."""
        by_folder: dict[str, tuple[dict[str, Stamp], dict[str, str]]] = {}  # stamps and paths by name
        for path, stamp in stamps.items():
            folder, name = os.path.split(path)
            if stamp is not None and folder in self._folders:
                of_names, paths = by_folder.setdefault(folder, ({}, {}))
                of_names[name], paths[name] = stamp, path
        return {
            paths[name]: value
            for folder, (of_names, paths) in by_folder.items()
            for name, value in self._folders[folder].known(fact, of_names).items()
        }

    def look_up(self, fact: Fact, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """(path, fact) for every file of which it is known and holds now."""
        with FileCalls() as calls:
            here = [path for path in paths if self.has(path)]
            for start in range(0, len(here), NOTED_TOGETHER):
                chunk = here[start : start + NOTED_TOGETHER]
                stamps = dict(zip(chunk, calls.results(stamp_of, chunk), strict=True))
                yield from self.known(fact, stamps).items()

    def saw(self, base: str, names: Texts, stamps_N3: np.ndarray) -> None:
        """Keep what the images of a folder looked like from outside when they were found; `names` are sorted.

        `base` is the folder with a separator behind it.
        """
        if (folder := os.path.dirname(base)) in self._folders:
            self._seen[folder] = (names, stamps_N3)

    def of_seen(self, fact: Fact, base: str, count: int) -> Iterator[Match]:
        """The facts that hold of the images that were seen in a folder, by their rows in what was seen.

        None where `count` is not how many were seen: some were left out since.
        """
        folder = os.path.dirname(base)
        if folder in self._seen and len(self._seen[folder][0]) == count:
            yield from self._folders[folder].matches(fact, *self._seen[folder])

    def in_folder(self, folder: Path | str) -> FolderIndex | None:
        """The index of a folder, if one is kept."""
        return self._folders.get(os.path.dirname(os.path.join(folder, NAME)))

    def arrange(self) -> None:
        """Make the next start quick: see :meth:`FolderIndex.arrange`."""
        for index in self._folders.values():
            index.arrange()

    def note(self, fact: Fact, path: str, value: bytes, since: int, stamp: Stamp | None = None) -> None:
        """Keep a fact that was read after `since` (time.time_ns())."""
        folder, name = os.path.split(path)
        index = self._folders.get(folder)
        if index is not None and index.writes:
            index.note(fact, name, stamp or stamp_of(path), value, since)

    def keep_only(self, folder: Path | str, names: Collection[str]) -> None:
        """Forget files that are gone from a folder; `names` are all that it holds."""
        index = self._folders.get(os.path.dirname(os.path.join(folder, NAME)))
        if index is not None:
            index.keep_only(names)

    def flush(self) -> None:
        """Write what was noted."""
        for index in self._folders.values():
            index.flush()


def now() -> int:
    """The time before a reading begins, for :meth:`DataIndex.note`."""
    return time.time_ns()
