"""What lies in a folder: images, other files, and what can't be used, with the reason. Nothing is opened here."""

from __future__ import annotations

import functools
import importlib.util
import os
import stat
from pathlib import Path
from typing import NamedTuple

from library.options import OptionError

OTHER_IMAGES = frozenset(  # what people take for an image that could be used
    (".gif", ".tif", ".tiff", ".jfif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".psd", ".svg", ".exr")
)


@functools.cache
def image_extensions() -> frozenset[str]:
    """Extensions of images, in lower case; AVIF and JPEG XL where a Pillow plug-in for them is installed."""
    extensions = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    for extension, modules in ((".avif", ("pillow_avif", "PIL._avif")), (".jxl", ("pillow_jxl", "jxlpy"))):
        if any(importlib.util.find_spec(module) for module in modules):
            extensions.add(extension)
    return frozenset(extensions)


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image; hidden ones, as some systems put beside images, do not."""
    return not is_hidden(name) and _has_image_extension(name)


def is_hidden(path: str) -> bool:
    """Whether a file or folder is one that systems and programs keep for themselves."""
    return os.path.basename(path).startswith(".")


def _has_image_extension(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_extensions()


def is_utf8(text: str) -> bool:
    """Whether a text can be written into files."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def why_no_name(path: str) -> str | None:
    """Why a path can't be written into files, which on some systems is any bytes; None where it can."""
    if is_utf8(path):
        return None
    try:
        os.fsencode(path).decode()
    except UnicodeError:
        return "its name is not UTF-8: rename it"
    return "its name can't be read in this locale: set PYTHONUTF8=1"


def entries_of(folder: Path | str, where: str = "training images") -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name. Raises OptionError for a folder that can't be used."""
    if reason := why_no_name(str(folder)):
        raise OptionError(where, f"{folder}: {reason}")
    if reason := why_closed(folder):
        raise OptionError(where, f"{folder} {reason}", "correct its permissions, or name another folder")
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def why_closed(folder: Path | str) -> str | None:
    """Why it can't be told what lies in a folder; None where it can."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        return f"can't be looked into ({error.strerror})"
    return None


def is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a circle
        return False


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def count_images(folder: Path) -> int:
    """How many images lie directly in `folder`; raises OptionError for a folder that can't be used."""
    return sum(is_image(entry.name) and is_file(entry) for entry in entries_of(folder))


class Listing(NamedTuple):
    """What lies directly in a folder of images."""

    files: list[str]  # names, sorted
    broken: dict[str, str]  # paths of image files that can't be read, with the reason
    passed_over: tuple[str, ...]  # paths: images of other kinds, hidden ones, and folders named like an image


def listing(folder: Path) -> Listing:
    """Raises OptionError for a folder that can't be used."""
    files, broken, passed_over = [], {}, []
    unusable = OTHER_IMAGES - image_extensions()
    for entry in entries_of(folder):
        if not _has_image_extension(entry.name):
            if is_file(entry):
                files.append(entry.name)
                passed_over += [entry.path] if os.path.splitext(entry.name)[1].lower() in unusable else []
        elif is_hidden(entry.name) or is_folder(entry):
            passed_over.append(entry.path)
        elif reason := why_no_name(entry.name):
            broken[entry.path] = reason
        elif is_file(entry):
            files.append(entry.name)
        else:
            broken[entry.path] = _why_no_file(entry)
    return Listing(files, broken, tuple(passed_over))


def _why_no_file(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "is a link to a file that is not there"
    is_pipe = stat.S_ISFIFO(entry.stat(follow_symlinks=False).st_mode)
    return f"is a {'pipe' if is_pipe else 'device'} and not a file"
