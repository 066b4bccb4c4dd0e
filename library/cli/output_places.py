"""Where a tool writes: refused before any work where something of the user's would be lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from library.checkpoints.weights import WEIGHTS_ENDINGS
from library.options import OptionError

ANOTHER_FILE = "choose another file"
ANOTHER_FOLDER = "choose another folder"


def output_file(name: str, flag: str, needed: Mapping[str, Sequence[str]]) -> Path:
    """The path of a file to write; OptionError naming `flag` for a folder, and for a file that is read as well.

    `needed`: what each kind of input is, in words, and its paths.
    """
    path = Path(name).expanduser()
    refuse_loop(path, flag)
    if path.is_dir() or name.endswith(("/", os.sep)):
        raise OptionError(flag, f"{path} is a folder", "name a file in it")
    for what, inputs in needed.items():
        for each in inputs:
            if _is_same(path, Path(each).expanduser()):
                raise OptionError(flag, f"{path} is {what}, which would be replaced", ANOTHER_FILE)
    return path


def weights_file(name: str, flag: str, needed: Mapping[str, Sequence[str]]) -> Path:
    """The same for a file of weights, whose ending says which form it has, in upper case or lower."""
    path = output_file(name, flag, needed)
    if path.suffix.lower() not in WEIGHTS_ENDINGS:
        raise OptionError(flag, f"{path} does not end in {', '.join(WEIGHTS_ENDINGS)}", "add an ending")
    return path


def output_folder(name: str, flag: str, source: Path, *, may_be_source: bool = False) -> Path:
    """The path of a folder to write to, made where it is missing; OptionError naming `flag` for one that can't be.

    Unless it `may_be_source`, it is not the folder that is read.
    """
    path = Path(name).expanduser()
    if not may_be_source and _is_same(path, source):
        raise OptionError(flag, f"{path} is the folder that is read", ANOTHER_FOLDER)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(flag, f"{path} can't be made ({error.strerror})", ANOTHER_FOLDER) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise OptionError(flag, f"{path} can't be written to", ANOTHER_FOLDER)
    return path


def _is_same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them is not there
        return os.path.realpath(path) == os.path.realpath(other)


def refuse_loop(path: Path, flag: str) -> None:
    """OptionError naming `flag` for a path that leads through a link to itself."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OptionError(flag, f"{path} leads through a link that leads to itself", ANOTHER_FILE) from None
