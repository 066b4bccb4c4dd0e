"""What lies in a folder: images, other files, and what can't be used, with the reason. Nothing is opened here."""

from __future__ import annotations

import functools
import importlib.util
import os
import stat
from collections.abc import Iterator
from operator import attrgetter
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
    name = os.path.basename(path) if os.sep in path or os.altsep else path
    return name.startswith(".")


def _has_image_extension(name: str) -> bool:
    """As of os.path.splitext, to which a name that begins with dots may have none; asked of each of many files."""
    extension = name[name.rfind(".") :] if "." in name else ""
    if extension.lower() not in image_extensions():
        return False
    return not name.startswith(".") or os.path.splitext(name)[1] != ""


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
    _refuse_closed(folder, where)
    with os.scandir(folder) as entries:
        return sorted(entries, key=attrgetter("name"))


def _refuse_closed(folder: Path | str, where: str) -> None:
    if reason := why_no_name(str(folder)):
        raise OptionError(where, f"{folder}: {reason}")
    if reason := why_closed(folder):
        raise OptionError(where, f"{folder} {reason}", "correct its permissions, or name another folder")


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
    return sum(1 for _ in _images_in(folder))


def has_images(folder: Path) -> bool:
    """Whether images lie directly in `folder`, of which only as much is looked at as that takes."""
    return any(True for _ in _images_in(folder))


def _images_in(folder: Path) -> Iterator[os.DirEntry[str]]:
    _refuse_closed(folder, "training images")
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if is_image(entry.name) and is_file(entry))


class Listing(NamedTuple):
    """What lies directly in a folder of images."""

    files: list[str]  # names, sorted
    broken: dict[str, str]  # paths of image files that can't be read, with the reason
    passed_over: tuple[str, ...]  # paths: images of other kinds, hidden ones, and folders named like an image
    links: frozenset[str] = frozenset()  # names of images that are links to files


def listing(folder: Path) -> Listing:
    """Raises OptionError for a folder that can't be used."""
    files: list[str] = []
    broken: dict[str, str] = {}
    passed_over: list[str] = []
    links: set[str] = set()
    unusable = tuple(OTHER_IMAGES - image_extensions())
    _refuse_closed(folder, "training images")
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if not _has_image_extension(name):
                if is_file(entry):
                    files.append(name)
                    passed_over += [entry.path] if name.lower().endswith(unusable) else []
            elif is_hidden(name) or is_folder(entry):
                passed_over.append(entry.path)
            elif not name.isascii() and (reason := why_no_name(name)):
                broken[entry.path] = reason
            elif is_file(entry):
                files.append(name)
                if entry.is_symlink():
                    links.add(name)
            else:
                broken[entry.path] = _why_no_file(entry)
    files.sort()
    return Listing(files, dict(sorted(broken.items())), tuple(sorted(passed_over)), frozenset(links))


def _why_no_file(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "is a link to a file that is not there"
    is_pipe = stat.S_ISFIFO(entry.stat(follow_symlinks=False).st_mode)
    return f"is a {'pipe' if is_pipe else 'device'} and not a file"
