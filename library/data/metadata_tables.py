"""Metadata files as they are: the table of each image, one after the other, from .json, .jsonl and .parquet files.

What the tables mean to a training run says metadata_file.py; the tools that write such files keep all that is in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from library.data.json_stream import NoObject, NotJSON, object_entries, parse_line
from library.options import OptionError, require
from library.packages import is_installed

KEY_NAMES = ("image_path", "file_name", "image_key", "key")  # of the image, in a line of .jsonl, a column of .parquet
KINDS = ("", ".json", ".jsonl", ".parquet")  # what names end in; of one without an ending the content is that of .json
ROWS_TOGETHER = 4096  # of a .parquet file
PARQUET_TEXTS = ("caption", "tags")
TRAIN_SIZE = "train_resolution"


class ImageTable(NamedTuple):
    """What a metadata file says of one image, as it stands there."""

    key: str
    table: Any  # a dict, if the file is right
    place: str  # "file: 'key' (line 3)"


def image_tables(path: Path, where: str) -> Iterator[ImageTable]:
    """The tables of a metadata file in their order, read as they are asked for.

    Raises OptionError naming `where`, or the file with line and key: at once for a file that isn't there, for others
    when the reading comes to it.
    """
    require(os.path.isfile(path), where, f"{str(path)!r} is no file", "name a .json, .jsonl or .parquet file")
    kind = path.suffix.lower()
    return _rows(path, where) if kind == ".parquet" else _texts(path, where, is_lines=kind == ".jsonl")


def _texts(path: Path, where: str, *, is_lines: bool) -> Iterator[ImageTable]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _lines(path, file) if is_lines else _entries(path, file)
    except OSError as error:
        raise OptionError(where, f"{path} can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError(where, f"line {_line_in_other_letters(path)} of {path} is not UTF-8", "save it as UTF-8") \
            from None  # fmt: skip
    except NotJSON as error:
        inside = "" if error.key is None else f", at {error.key!r}"
        problem = f"line {error.line} is not JSON ({error.problem}){inside}"
        raise OptionError(str(path), problem, "correct that line") from None
    except NoObject:
        way_out = 'write {"image": {"caption": ...}}'
        raise OptionError(str(path), "is not an object of image keys", way_out) from None


def _entries(path: Path, file: TextIO) -> Iterator[ImageTable]:
    seen: set[int] = set()  # hashes: the keys themselves would be most of what is in memory
    for key, table, line in object_entries(file):
        if hash(key) in seen and _stands_twice(path, key):
            raise OptionError(str(path), f"the key {key!r} stands in it twice (line {line})", "remove one of them")
        seen.add(hash(key))
        yield ImageTable(key, table, f"{path}: {key!r} (line {line})")


def _stands_twice(path: Path, key: str) -> bool:
    with open(path, encoding="utf-8-sig") as file:
        return sum(each == key for each, _, _ in object_entries(file)) > 1


def _lines(path: Path, file: TextIO) -> Iterator[ImageTable]:
    for number, line in enumerate(file, 1):  # other characters that end lines are text
        if line.strip():
            yield _named(path, parse_line(line, number), f"line {number}")


def _named(path: Path, table: Any, place: str) -> ImageTable:
    """The table of a line or row without the key of its image."""
    name = next((name for name in KEY_NAMES if table.get(name) is not None), None) if isinstance(table, dict) else None
    if name is None or not isinstance(table[name], str):
        raise OptionError(str(path), f"{place} names no image", f"give it {KEY_NAMES[0]}")
    key = table.pop(name)
    return ImageTable(key, table, f"{path}: {key!r} ({place})")


def _line_in_other_letters(path: Path) -> int:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _rows(path: Path, where: str) -> Iterator[ImageTable]:
    parquet = _pyarrow_parquet(where)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_TOGETHER):
                for row in batch.to_pylist():
                    number += 1
                    known = {name: value for name, value in row.items() if value is not None}
                    yield _named(path, known, f"row {number}")
    except OSError as error:
        raise OptionError(where, f"{path} can't be read ({error.strerror or error})") from None
    except ValueError as error:  # pyarrow's own errors are ValueErrors
        if isinstance(error, OptionError):
            raise
        reason = str(error).splitlines()[0]
        raise OptionError(where, f"{path} can't be read as Parquet ({reason})", "write it anew") from None


def _pyarrow_parquet(where: str) -> Any:
    way_out = "pip install pyarrow, or use .jsonl"
    require(is_installed("pyarrow"), where, "a .parquet file needs the package pyarrow", way_out)
    import pyarrow.parquet  # type: ignore[import-not-found]

    return pyarrow.parquet


# ---------------------------------------------------------------------------------------------- writing


def check_kind(path: Path, where: str) -> None:
    """Raise OptionError naming `where` for a file to be written whose name says no kind of metadata file."""
    if path.suffix.lower() not in KINDS:
        problem = f"{str(path)!r} ends in {path.suffix}, which is no metadata file"
        raise OptionError(where, problem, "use .json, .jsonl or .parquet")


def write_tables(path: Path, tables: Iterable[tuple[str, dict[str, Any]]], where: str) -> int:
    """Write (key, table) pairs as they come, in the form that the file's name says; returns how many.

    Under the file's name there is never less than a whole file; nothing is left behind where `tables` raise. A .json
    file is written as json.dumps with an indent of 2 would. Raises OptionError naming `where`.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    kind = path.suffix.lower()
    count = 0

    def counted() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal count
        for count, pair in enumerate(tables, 1):  # noqa: B007 (the number is what is wanted)
            yield pair

    try:
        if kind == ".parquet":
            _write_rows(temporary, counted(), where)
        else:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(_as_lines(counted()) if kind == ".jsonl" else _as_object(counted()))
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OptionError(where, f"can't write {path} ({error.strerror or error})", "choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
    return count


def _as_object(tables: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    before = "{\n"
    for key, table in tables:
        text = json.dumps(table, indent=2).replace("\n", "\n  ")  # within texts they are escaped
        yield f"{before}  {json.dumps(key)}: {text}"
        before = ",\n"
    yield "{}" if before == "{\n" else "\n}"


def _as_lines(tables: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    for key, table in tables:
        yield f"{json.dumps({KEY_NAMES[0]: key, **table})}\n"


def _write_rows(path: Path, tables: Iterable[tuple[str, dict[str, Any]]], where: str) -> None:
    parquet = _pyarrow_parquet(where)
    import pyarrow as pa  # type: ignore[import-not-found]

    texts = [(name, pa.string()) for name in (KEY_NAMES[0], *PARQUET_TEXTS)]
    schema = pa.schema([*texts, (TRAIN_SIZE, pa.list_(pa.int32()))])
    with open(path, "wb") as file, parquet.ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []
        for key, table in tables:
            if others := sorted(set(table) - set(schema.names)):
                problem = f"{key!r} has {', '.join(others)}, for which the columns of a .parquet file have no place"
                raise OptionError(where, problem, "write .json or .jsonl")
            rows.append({KEY_NAMES[0]: key, **table})
            if len(rows) == ROWS_TOGETHER:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
