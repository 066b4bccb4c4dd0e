"""Class folders: a folder of training images whose sub-folders say their repeats and class by their names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from library.data.listing import count_images, entries_of, has_images, is_folder, is_hidden, why_closed
from library.data.options import MOST_REPEATS, FolderOptions
from library.options import OptionError, require
from library.wording import counted

logger = logging.getLogger(__name__)


class ClassFolder(NamedTuple):
    """A sub-folder as its name reads: why it is passed over, or how it is used."""

    path: Path
    repeats: int | None  # None: not of the form <repeats>_<class>
    class_tokens: str

    @property
    def used(self) -> bool:
        return self.repeats is not None and self.repeats >= 1


def parse_folder_name(name: str) -> tuple[int | None, str]:
    """(repeats, class tokens) of "<repeats>_<class>"; repeats is None where no whole number comes first."""
    first, _, rest = name.partition("_")
    try:
        return int(first), rest
    except ValueError:
        return None, ""


def class_folders(base: str, flag: str, default_repeats: int = 1) -> Iterator[FolderOptions]:
    """The class folders in `base` that hold images, or `base` itself with `default_repeats`.

    Raises OptionError with all it looked at, and for a class folder that can't be looked into.
    """
    path = Path(base)
    require(
        os.path.isdir(path), flag, f"{base!r} is not a folder", "name an existing folder of images or of class folders"
    )
    children, counts, own_images = _look_into(path)
    for child in (child for child in children if child.used):
        _check_class_folder(child, flag)
    used = [child for child in children if child.used and counts[child.path]]
    if not used and not own_images:
        way_out = "name class folders <repeats>_<class>, for example 10_cat, or name the folder of images itself"
        raise OptionError(flag, f"no images found; {way_out}; looked at:{_tree(path, children, counts)}")
    if not used:
        showings = counted(default_repeats, "repeat")
        logger.info("%s holds %s itself: %s, no class", path, counted(own_images, "image"), showings)
        yield FolderOptions(image_dir=path, num_repeats=default_repeats)
        return
    for child in used:
        yield FolderOptions(child.path, child.repeats or 1, child.class_tokens)


def _check_class_folder(child: ClassFolder, flag: str) -> None:
    if reason := why_closed(child.path):
        raise OptionError(flag, f"{child.path} {reason}", "correct its permissions, or move it elsewhere")
    if child.repeats is not None and child.repeats > MOST_REPEATS:
        problem = f"{child.path.name} would be shown {child.repeats} times per epoch (is {child.repeats} a date?)"
        raise OptionError(flag, problem, f"rename it, for example to 10_{child.class_tokens}")


def passed_over_folders(base: Path | str) -> list[tuple[Path, str]]:
    """(folder, why) for what lies in an existing `base` and is not trained on: sub-folders, and images beside them."""
    children, counts, own_images = _look_into(Path(base))
    used = [child for child in children if child.used and counts[child.path]]
    found = [(child.path, why_passed_over(child, counts[child.path])) for child in children if child not in used]
    if used and own_images:
        found.append((Path(base), f"{counted(own_images, 'image')} directly in it, but there are class folders"))
    return found


def _look_into(path: Path) -> tuple[list[ClassFolder], dict[Path, int], int]:
    """(sub-folders in order, how many images each holds, how many lie directly in the folder).

    Of those that may be used it is only told whether there are any.
    """
    folders = [Path(entry.path) for entry in entries_of(path) if is_folder(entry)]
    children = [ClassFolder(folder, *parse_folder_name(folder.name)) for folder in folders]
    counts = {
        child.path: 0 if why_closed(child.path) else int((has_images if child.used else count_images)(child.path))
        for child in children
    }
    return children, counts, count_images(path)


def _tree(path: Path, children: Sequence[ClassFolder], counts: Mapping[Path, int]) -> str:
    lines = [f"\n  {path}{os.sep}: no images directly in it"]
    lines += [f"\n    {child.path.name}{os.sep}: {why_passed_over(child, counts[child.path])}" for child in children]
    return "".join(lines)


def why_passed_over(child: ClassFolder, num_images: int) -> str:
    """Why a sub-folder with this many images is not trained on."""
    if not num_images:
        return why_empty(child.path)
    if is_hidden(child.path.name):
        return "a hidden folder"
    images = counted(num_images, "image")
    if child.repeats is None:
        name = child.path.name
        return f"{images}, but the name does not begin with the repeats; rename it, for example to 10_{name}"
    return f"{images}, but {counted(child.repeats, 'repeat')}"


def why_empty(folder: Path) -> str:
    """Why a folder gives no images, with a look one level deeper."""
    if reason := why_closed(folder):
        return reason
    entries = entries_of(folder)
    children = [Path(entry.path) for entry in entries if is_folder(entry) and not is_hidden(entry.name)]
    deeper = next((child for child in children if not why_closed(child) and count_images(child)), None)
    if deeper:
        return f"no images, but {count_images(deeper)} in {deeper.name}{os.sep}; only one level is looked at"
    num_files = len(entries)
    return f"{counted(num_files, 'file')}, no image" if num_files else "empty"
