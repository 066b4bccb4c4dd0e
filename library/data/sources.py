"""Headers and captions of images: one small read per image and one per caption file. Nothing is decoded here."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from library.data.headers import BadImage, Header, read_header
from library.data.index import DataIndex, Fact, now, stamp_of
from library.data.listing import image_extensions, is_hidden
from library.data.progress import progress
from library.data.slow_files import FileCalls
from library.options import OptionError
from library.wording import counted

if TYPE_CHECKING:
    from library.data.folder_contents import FolderContents

logger = logging.getLogger(__name__)

LINE_ENDS = re.compile(r"\r\n?|\n")  # not the other characters that Unicode counts as such: they are text
NAMES_SHOWN = 5
READ_TOGETHER = 256  # images between two looks at how slow the disk is

ReadTask = tuple[str, str | None]  # image, caption file
ReadResult = tuple[Header | BadImage, str | None | UnicodeDecodeError]


def read_all(
    tasks: Sequence[ReadTask], name: str, all_lines: bool = False, index: DataIndex | None = None
) -> Iterator[ReadResult]:
    """Header and caption of each image; what the `index` knows comes from there, what it doesn't is noted in it."""
    index = index or DataIndex()
    with progress(f"reading {name}", len(tasks)) as bar, FileCalls() as calls:
        for start in range(0, len(tasks), READ_TOGETHER):
            chunk = tasks[start : start + READ_TOGETHER]
            for header, text in known_or_read(chunk, index, calls):
                yield header, text.split("\n", 1)[0] if isinstance(text, str) and not all_lines else text
            bar.update(len(chunk))
    index.flush()


def known_or_read(tasks: Sequence[ReadTask], index: DataIndex, calls: FileCalls) -> Iterator[ReadResult]:
    """Headers and whole captions of a few hundred or thousand images; see :func:`read_all`."""
    if not any(index.has(image) for image, _ in tasks):
        yield from calls.results(_read, tasks)
        return
    files = [file for task in tasks for file in task if file is not None]
    stamps = dict(zip(files, calls.results(stamp_of, files), strict=True))
    headers = index.known(Fact.HEADER, {image: stamps.get(image) for image, _ in tasks})
    texts = index.known(Fact.CAPTION, {text: stamps.get(text) for _, text in tasks if text is not None})
    known = {task: result for task in tasks if (result := _from_facts(task, headers, texts)) is not None}
    since = now()
    fresh = [task for task in tasks if task not in known]
    for task, result in zip(fresh, calls.results(_read, fresh), strict=True):
        known[task] = result
        (image, text_path), (header, text) = task, result
        if isinstance(header, Header):
            index.note(Fact.HEADER, image, header.packed(), since, stamps.get(image))
        if text_path is not None and isinstance(text, str):
            index.note(Fact.CAPTION, text_path, text.encode(), since, stamps.get(text_path))
    yield from (known[task] for task in tasks)


def _from_facts(task: ReadTask, headers: Mapping[str, bytes], texts: Mapping[str, bytes]) -> ReadResult | None:
    image, text_path = task
    if image not in headers or not (text_path is None or text_path in texts):
        return None
    header = Header.unpacked(headers[image])
    try:
        return None if header is None else (header, None if text_path is None else texts[text_path].decode())
    except UnicodeDecodeError:
        return None


def _read(task: ReadTask) -> ReadResult:
    image_path, caption_path = task
    try:
        header = read_header(image_path)
    except BadImage as error:
        return error, None
    try:
        return header, read_caption(caption_path, all_lines=True) if caption_path else None
    except UnicodeDecodeError as error:
        return header, error


def read_caption(path: str, *, all_lines: bool = False) -> str:
    """The first line with text in it, stripped, or all of them; see :func:`read_text_file`."""
    lines = [line.strip() for line in read_text_file(path).split("\n") if line.strip()]
    return "\n".join(lines if all_lines else lines[:1])


def read_text_file(path: str) -> str:
    """The text of a file with "\\n" at the ends of lines; byte-order marks (UTF-8, UTF-16) are understood.

    Raises UnicodeDecodeError for text in other encodings, and OptionError where the file can't be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            raw = file.read()
    except OSError as error:
        raise OptionError("captions", f"{path} can't be read ({error.strerror})", "mend or remove it") from None
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = raw.decode(encoding)
    if "\0" in text:  # UTF-16 without its mark, or UTF-32
        raise UnicodeDecodeError(encoding, raw, 0, len(raw), "holds NUL characters")
    return LINE_ENDS.sub("\n", text)


# ---------------------------------------------------------------------------------------------- reports


def report_captions(folders: Iterable[tuple[FolderContents, str]]) -> None:
    """Log other extensions in use than the one that each folder comes with; stop on captions that aren't UTF-8."""
    folders = list(folders)
    unreadable = [path for contents, _ in folders for path in contents.unreadable_captions]
    if unreadable:
        raise OptionError("captions", f"not UTF-8: {listed(unreadable)}", "save these files as UTF-8")
    pairs = {(asked, contents.caption_extension) for contents, asked in folders}
    others = {(asked, used) for asked, used in pairs if used not in ("", asked)}
    for asked in sorted({asked for asked, _ in others}):
        used = sorted(used for each, used in others if each == asked)
        logger.info("captions: no %s files; using the %s files that are there", asked, " and ".join(used))


def kinds_passed_over(paths: Iterable[str]) -> str:
    """How many files of which kinds lie beside the images and are not used: "1 .gif, 2 hidden .jpg"."""
    kinds = Counter(map(_kind_of_passed_over, set(paths)))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _kind_of_passed_over(path: str) -> str:
    extension = os.path.splitext(path)[1].lower()
    if is_hidden(path):
        return f"hidden {extension}"
    return f"folder named {extension}" if extension in image_extensions() else extension


def refuse_broken(broken: Mapping[str, str]) -> None:
    """Raise OptionError with every broken image, if there are any."""
    if broken:
        count = counted(len(broken), "broken image")
        raise OptionError(
            "training images", f"{count}; mend or remove them, or use --on_bad_image skip:{table_of_broken(broken)}"
        )


def table_of_broken(broken: Mapping[str, str]) -> str:
    return "".join(f"\n  {path}: {reason}" for path, reason in sorted(broken.items()))


def listed(paths: Sequence[str]) -> str:
    """The first names, with their folders, and how many more."""
    names = ", ".join(map(with_folder, paths[:NAMES_SHOWN]))
    return f"{names} and {len(paths) - NAMES_SHOWN} more" if len(paths) > NAMES_SHOWN else names


def with_folder(path: str) -> str:
    """The last folder of a path, and the file."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.basename(folder), name)
