"""Folders of images: listing, headers, captions. Nothing is decoded here, and torch and numpy are not needed.

One os.scandir per folder tells which images and which caption files there are; then one small read per image and one
per caption file.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from library.data.headers import BadImage, Header, read_header
from library.options import OptionError

logger = logging.getLogger(__name__)

CAPTION_FALLBACKS = (".txt", ".caption")  # what people have when nothing has the extension asked for
FACE_PIECES = 4  # "name_cx_cy_w_h": a face position in the file name, which the caption's name may lack
NAMES_SHOWN = 5
READ_TOGETHER = 256  # images between two looks at how slow the disk is
SLOW_SECONDS = 0.0005  # of waiting per image, not of work: more means a slow disk
SLOW_DISK_THREADS = 32

ReadTask = tuple[str, str | None]  # image, caption file
ReadResult = tuple[Header | BadImage, str | None | UnicodeDecodeError]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image file as found in its folder."""

    path: str
    size_wh: tuple[int, int]  # upright
    orientation: int  # of Exif, 1-8
    caption: str


@dataclass(frozen=True)
class FolderContents:
    """What a scan of one folder found."""

    images: tuple[ImageRecord, ...]
    broken: dict[str, str] = field(default_factory=dict)  # path -> reason
    uncaptioned: tuple[str, ...] = ()  # paths of images without a caption file
    caption_extension: str = ""  # the one used
    unreadable_captions: tuple[str, ...] = ()  # not UTF-8

    def without(self, paths: Collection[str]) -> FolderContents:
        """The same, less these images."""
        return replace(self, images=tuple(image for image in self.images if image.path not in paths))


@functools.cache
def image_extensions() -> frozenset[str]:
    """Extensions of images, in lower case; AVIF and JPEG XL where a Pillow plug-in for them is installed."""
    extensions = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    for extension, modules in ((".avif", ("pillow_avif", "PIL._avif")), (".jxl", ("pillow_jxl", "jxlpy"))):
        if any(importlib.util.find_spec(module) for module in modules):
            extensions.add(extension)
    return frozenset(extensions)


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return os.path.splitext(name)[1].lower() in image_extensions()


def count_images(folder: Path) -> int:
    """How many images lie directly in `folder`."""
    with os.scandir(folder) as entries:
        return sum(is_image(entry.name) and entry.is_file() for entry in entries)


def scan_folder(folder: Path, *, caption_extension: str, class_tokens: str | None) -> FolderContents:
    """The images directly in `folder`, sorted by name, with sizes and captions.

    An image without a caption file gets `class_tokens`, or the empty caption. When no image has a caption file of
    `caption_extension` but there are .txt or .caption files, those are used.
    """
    with os.scandir(folder) as entries:
        files = {entry.name for entry in entries if entry.is_file()}
    names = sorted(name for name in files if is_image(name))
    extension = _extension_in_use(names, files, caption_extension)
    base = os.path.join(folder, "")
    files_of = [(base + name, _caption_name(name, files, extension)) for name in names]
    tasks = [(path, base + caption if caption else None) for path, caption in files_of]
    images, broken, uncaptioned, unreadable = [], {}, [], []
    for (path, caption_path), (header, caption) in zip(tasks, _read_all(tasks, folder.name), strict=True):
        if isinstance(header, BadImage):
            broken[path] = str(header)
        elif isinstance(caption, UnicodeDecodeError):
            unreadable.append(caption_path)
        else:
            text = (class_tokens or "") if caption is None else caption
            images.append(ImageRecord(path, header.size_wh, header.orientation, text))
            uncaptioned += [] if caption_path else [path]
    return FolderContents(tuple(images), broken, tuple(uncaptioned), extension, tuple(unreadable))


def _read_all(tasks: Sequence[ReadTask], name: str) -> Iterator[ReadResult]:
    """Read image by image; in threads where files answer slowly, as over a network.

    From memory or a fast disk one thread is faster than many, which would take turns at the interpreter.
    """
    bar = tqdm(total=len(tasks), desc=f"reading {name}", leave=False, delay=2, unit="image")
    with bar, ThreadPoolExecutor(SLOW_DISK_THREADS) as pool:
        waited = 0.0
        for start in range(0, len(tasks), READ_TOGETHER):
            chunk = tasks[start : start + READ_TOGETHER]
            before = time.perf_counter() - time.thread_time()
            is_slow = waited > SLOW_SECONDS * READ_TOGETHER
            yield from [*(pool.map if is_slow else map)(_read, chunk)]
            if not is_slow:
                waited = time.perf_counter() - time.thread_time() - before
            bar.update(len(chunk))


def _read(task: ReadTask) -> ReadResult:
    image_path, caption_path = task
    try:
        header = read_header(image_path)
    except BadImage as error:
        return error, None
    try:
        return header, read_caption(caption_path) if caption_path else None
    except UnicodeDecodeError as error:
        return header, error


def read_caption(path: str) -> str:
    """The first line with text in it, stripped; byte-order marks (UTF-8, UTF-16) are understood."""
    with open(path, "rb", buffering=0) as file:
        raw = file.read()
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    lines = (line.strip() for line in raw.decode(encoding).splitlines())
    return next((line for line in lines if line), "")


def _extension_in_use(names: Sequence[str], files: set[str], asked: str) -> str:
    for extension in (asked, *CAPTION_FALLBACKS):
        if any(_caption_name(name, files, extension) for name in names):
            return extension
    return asked


def _caption_name(image_name: str, files: set[str], extension: str) -> str | None:
    stem = os.path.splitext(image_name)[0]
    if stem + extension in files:
        return stem + extension
    pieces = stem.split("_")
    without_face = "_".join(pieces[:-FACE_PIECES]) + extension
    return without_face if len(pieces) > FACE_PIECES and without_face in files else None


# ---------------------------------------------------------------------------------------------- reports


def report_captions(folders: Iterable[tuple[FolderContents, str, str | None]]) -> None:
    """Log, in one line each, other extensions in use and missing captions; stop on captions that aren't UTF-8.

    Each folder comes with the caption extension that was asked for and its class tokens.
    """
    folders = list(folders)
    unreadable = [path for contents, _, _ in folders for path in contents.unreadable_captions]
    if unreadable:
        raise OptionError("captions", f"not UTF-8: {listed(unreadable)}", "save these files as UTF-8")
    for asked in sorted({asked for contents, asked, _ in folders if contents.caption_extension != asked}):
        used = sorted({c.caption_extension for c, a, _ in folders if a == asked and c.caption_extension != asked})
        logger.info("captions: no %s files; using the %s files that are there", asked, " and ".join(used))
    with_class = [path for contents, _, tokens in folders if tokens for path in contents.uncaptioned]
    without = [path for contents, _, tokens in folders if not tokens for path in contents.uncaptioned]
    if with_class:
        logger.info("captions: %d images have none and use their class tokens: %s", len(with_class), listed(with_class))
    if without:
        logger.warning("captions: %d images have none and use the empty caption: %s", len(without), listed(without))


def report_broken(broken: dict[str, str], on_bad_image: str) -> None:
    """List every broken image at once: stop with OptionError, or warn, as `on_bad_image` says."""
    if not broken:
        return
    count = f"{len(broken)} broken image{'s' if len(broken) > 1 else ''}"
    table = "".join(f"\n  {path}: {reason}" for path, reason in sorted(broken.items()))
    if on_bad_image == "stop":
        way_out = "mend or remove them, or use --on_bad_image skip"
        raise OptionError("training images", f"{count}; {way_out}:{table}")
    logger.warning("%s left out:%s", count, table)


def listed(paths: Sequence[str]) -> str:
    """The first names, and how many more."""
    names = ", ".join(os.path.basename(path) for path in paths[:NAMES_SHOWN])
    return f"{names} and {len(paths) - NAMES_SHOWN} more" if len(paths) > NAMES_SHOWN else names
