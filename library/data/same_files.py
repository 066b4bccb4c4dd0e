"""One file under several names: relative and absolute, through links, on Windows in other capitals."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def path_key(path: Path | str) -> str:
    """What is equal for all names of one file or folder, links followed."""
    return os.path.normcase(os.path.realpath(path))


def file_keys(paths: Iterable[str]) -> dict[str, str]:
    """Path -> what is equal for all names of one file. Hard links count as files of their own."""
    folder_keys: dict[str, str] = {}
    keys: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folder_keys:
            folder_keys[folder] = path_key(folder)
        keys[path] = (
            path_key(path) if os.path.islink(path) else os.path.join(folder_keys[folder], os.path.normcase(name))
        )
    return keys
