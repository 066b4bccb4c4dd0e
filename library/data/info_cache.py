"""metadata_cache.json: sizes and captions of a folder's images, noted so that they needn't be read again.

As in the trade, an object {image path: {"caption", "resolution"}}; with what is needed to see that neither the image
nor its caption file has changed since. An entry without that, as other programs write it, is not trusted.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from library.data.headers import BadImage, Header

logger = logging.getLogger(__name__)

NAME = "metadata_cache.json"

Task = tuple[str, str | None]  # image, caption file
Result = tuple[Header | BadImage, str | None | UnicodeDecodeError]


def read_with_notes(
    folder: Path, tasks: Sequence[Task], read: Callable[[Sequence[Task]], Iterable[Result]], *, all_lines: bool
) -> list[Result]:
    """What `read` gives for the tasks, from the notes where they hold; the notes are then brought up to date.

    `all_lines` says how captions are read; notes of the other way don't count.
    """
    notes = _load(folder)
    stamps = {task: _stamp(task, all_lines=all_lines) for task in tasks}
    known = {task: result for task in tasks if (result := _noted(notes, task, stamps[task])) is not None}
    fresh = iter(list(read([task for task in tasks if task not in known])))
    results = [known.get(task) or next(fresh) for task in tasks]
    kept = {
        os.path.basename(task[0]): _entry(header, caption, stamps[task])
        for task, (header, caption) in zip(tasks, results, strict=True)
        if isinstance(header, Header) and not isinstance(caption, UnicodeDecodeError)
    }
    if kept != notes:
        _save(folder, kept)
    return results


def _stamp(task: Task, *, all_lines: bool) -> list[Any] | None:
    """What changes with the files; None for files that can't be looked at."""
    image, caption = task
    try:
        files = [image] if caption is None else [image, caption]
        states = [(os.path.basename(file), os.stat(file)) for file in files]
    except OSError:
        return None
    return [all_lines, *([name, state.st_size, state.st_mtime_ns] for name, state in states)]


def _noted(notes: dict[str, Any], task: Task, stamp: list[Any] | None) -> Result | None:
    entry = notes.get(os.path.basename(task[0]))
    if stamp is None or not isinstance(entry, dict) or entry.get("stamp") != stamp:
        return None
    try:
        width, height = entry["resolution"]
        orientation, has_alpha, caption = int(entry["orientation"]), bool(entry["alpha"]), str(entry["caption"])
        size_wh = (int(height), int(width)) if orientation >= 5 else (int(width), int(height))
    except (KeyError, TypeError, ValueError):
        return None
    return Header(size_wh, orientation, stamp[1][1], has_alpha), None if task[1] is None else caption


def _entry(header: Header, caption: str | None, stamp: list[Any] | None) -> dict[str, Any]:
    width, height = header.size_wh
    return {
        "caption": caption or "",
        "resolution": [height, width] if header.orientation >= 5 else [width, height],  # as stored
        "orientation": header.orientation,
        "alpha": header.has_alpha,
        "stamp": stamp,
    }


def _load(folder: Path) -> dict[str, Any]:
    """By the images' names; nothing where there is no such file, or none that can be read."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {os.path.basename(key): entry for key, entry in content.items()} if isinstance(content, dict) else {}


def _save(folder: Path, entries: dict[str, Any]) -> None:
    temporary = folder / f"{NAME}.{secrets.token_hex(4)}.tmp"
    content = {os.path.join(folder, name): entry for name, entry in entries.items()}
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, folder / NAME)
    except OSError as error:
        logger.warning("--cache_info: can't write %s (%s)", folder / NAME, error.strerror)
        temporary.unlink(missing_ok=True)
