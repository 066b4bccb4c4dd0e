"""Metadata files: captions and tags of many images in one .json or .jsonl file.

A .json file is an object {image key: {"caption", "tags", "train_resolution"}}, as the trade's tagging and caching tools
write it. In a .jsonl file every line is such an object with the key under one of KEY_NAMES. An image key is a path, or
a name without extension in the folder of the images. Nothing here needs torch or numpy.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.listing import is_utf8
from library.data.options import LATENT_STRIDE, MAX_SIDE
from library.options import OptionError, require

KEY_NAMES = ("image_path", "file_name", "image_key", "key")  # of the image, in a line of a .jsonl file
CAPTION_NAMES = ("caption", "text")

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """What a metadata file says of one image."""

    key: str
    caption: str  # without the tags; empty where there is none
    tags: str  # empty where there are none
    train_size: Size | None  # (width, height) the image is to be trained at

    def joined(self, between: str, *, all_lines: bool = False) -> str:
        """Caption and tags with `between` between them; with `all_lines`, one of which is drawn, in every line."""
        if not self.tags or not self.caption:
            return self.caption or self.tags
        if not all_lines:
            return f"{self.caption}{between}{self.tags}"
        lines = (line.strip() for line in self.caption.split("\n"))
        return "\n".join(f"{line}{between}{self.tags}" for line in lines if line)


def read_metadata(path: Path, where: str) -> tuple[MetadataEntry, ...]:
    """The entries of a metadata file in their order; raises OptionError naming `where`, or the file and its entry."""
    require(os.path.isfile(path), where, f"{str(path)!r} is no file", "name a .json or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OptionError(where, f"{path} can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError(where, f"{path} is not UTF-8", "save it as UTF-8") from None
    tables = _lines(path, text) if path.suffix.lower() == ".jsonl" else _object(path, text)
    return tuple(_entry(key, table, f"{path}: {key!r}") for key, table in tables)


def common_train_sizes(entries: Iterable[MetadataEntry]) -> tuple[Size, ...] | None:
    """The sizes that the entries are to be trained at, ascending; None unless every entry has one."""
    sizes = {entry.train_size for entry in entries}
    return None if None in sizes or not sizes else tuple(sorted(size for size in sizes if size))


def _object(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    content = _parsed(text, path, 0)
    require(isinstance(content, dict), str(path), "is not an object of image keys", 'write {"image": {"caption": ...}}')
    return iter(content.items())


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n")):  # other characters that end lines are text
        if not line.strip():
            continue
        table = _parsed(line, path, number)
        key = next((table[name] for name in KEY_NAMES if name in table), None) if isinstance(table, dict) else None
        if not isinstance(key, str):
            raise OptionError(str(path), f"line {number + 1} names no image", f"give it {KEY_NAMES[0]}")
        yield key, table


def _parsed(text: str, path: Path, lines_before: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except _TwiceError as error:
        raise OptionError(str(path), f"the key {error.args[0]!r} stands in it twice", "remove one of them") from None
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno + lines_before} is not JSON ({error.msg})"
        raise OptionError(str(path), problem, "correct that line") from None
    except RecursionError:
        raise OptionError(str(path), "is nested too deeply to be a metadata file") from None


class _TwiceError(Exception):
    """A key that stands twice in one object."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _TwiceError(key)
    return content


def _entry(key: str, table: Any, place: str) -> MetadataEntry:
    if not isinstance(table, dict):
        raise OptionError(place, f"{table!r} is not a table", 'write {"caption": "..."} in its place')
    caption = next((_text(table, name, place) for name in CAPTION_NAMES if table.get(name) is not None), "")
    tags = _text(table, "tags", place)
    return MetadataEntry(key, caption, tags, _train_size(table.get("train_resolution"), place))


def _text(table: Mapping[str, Any], name: str, place: str) -> str:
    value = table.get(name)
    require(value is None or isinstance(value, str), place, f"{name} {value!r} is not a text")
    require(is_utf8(value or ""), place, f"{name} {value!r} has half a character", "write it anew")
    return value or ""


def _train_size(value: Any, place: str) -> Size | None:
    """(width, height), rounded down to what the VAE can encode, as the trade's caching tool does."""
    if value is None:
        return None
    is_size = isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
    if not is_size or not LATENT_STRIDE <= min(value) <= max(value) <= MAX_SIDE:
        raise OptionError(place, f"train_resolution {value!r} is no size", "write [width, height]")
    width, height = (side // LATENT_STRIDE * LATENT_STRIDE for side in value)
    return width, height
