"""Folders of images: listing, headers, captions. Nothing is decoded here, and torch and numpy are not needed.

One os.scandir per folder tells which images and which caption files there are; then one small read per image and one
per caption file.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.data.headers import BadImage, Header, read_header
from library.data.index import DataIndex, Fact, now, stamp_of
from library.data.listing import image_extensions, is_hidden, is_image, listing
from library.data.progress import progress
from library.data.slow_files import FileCalls
from library.options import OptionError
from library.wording import counted

logger = logging.getLogger(__name__)

LINE_ENDS = re.compile(r"\r\n?|\n")  # not the other characters that Unicode counts as such: they are text
CAPTION_FALLBACKS = (".txt", ".caption")  # what people have when nothing has the extension asked for
FACE_PIECES = 4  # "name_cx_cy_w_h": a face position in the file name, which the caption's name may lack
NAMES_SHOWN = 5
READ_TOGETHER = 256  # images between two looks at how slow the disk is

ReadTask = tuple[str, str | None]  # image, caption file
ReadResult = tuple[Header | BadImage, str | None | UnicodeDecodeError]


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A picture that says which parts of an image count: white all, black not at all."""

    path: str
    size_wh: tuple[int, int]  # upright
    orientation: int
    num_bytes: int  # of the file


@dataclass(frozen=True, slots=True)
class FromMetadata:
    """What a metadata file says of its image, and the latents that lie beside it."""

    tags: str  # what its tag statistics count
    train_wh: tuple[int, int] | None  # the size to train at
    npz: str | None = None  # latents
    flipped_npz: str | None = None  # those of the mirrored image, where older tools gave them a file of their own
    has_image: bool = True  # False: there are only latents, and the record's path is theirs


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image file as found in its folder, or by its metadata."""

    path: str
    size_wh: tuple[int, int]  # upright
    orientation: int  # of Exif, 1-8
    caption: str
    num_bytes: int  # of the file
    has_alpha: bool = False  # whether its kind of file can be transparent
    mask: MaskFile | None = None
    metadata: FromMetadata | None = None


@dataclass(frozen=True)
class FolderContents:
    """What a scan of one folder, or of the images of one metadata file, found."""

    images: tuple[ImageRecord, ...]
    broken: dict[str, str] = field(default_factory=dict)  # path -> reason
    uncaptioned: tuple[str, ...] = ()  # paths of images without a caption file
    caption_extension: str = ""  # the one used; empty where captions are in no files of their own
    unreadable_captions: tuple[str, ...] = ()  # not UTF-8
    passed_over: tuple[str, ...] = ()  # paths: images of other kinds, hidden ones, and folders named like an image
    unnamed: tuple[str, ...] = ()  # paths of images in the folder that the metadata file does not name
    alone: tuple[str, ...] = ()  # paths of caption files without an image
    sharing: tuple[str, ...] = ()  # paths of images whose caption file is also that of another: a.png and a.jpg

    def without(self, paths: Collection[str]) -> FolderContents:
        """The same, less these images."""
        gone = frozenset(paths)
        return replace(self, images=tuple(image for image in self.images if not _files_of(image) & gone))


def _files_of(image: ImageRecord) -> set[str]:
    return {image.path} | ({image.mask.path} if image.mask else set())


def scan_folder(
    folder: Path,
    *,
    caption_extension: str,
    class_tokens: str | None,
    all_lines: bool = False,
    index: DataIndex | None = None,
    index_policy: str = "auto",
) -> FolderContents:
    """The images directly in `folder`, sorted by name, with sizes and captions.

    Captions are the first line with text of their files, or, with `all_lines`, all those lines. An image without a
    caption file gets `class_tokens`, or the empty caption. When no image has a caption file of `caption_extension` but
    there are .txt or .caption files, those are used. What the `index` knows of the folder's files is not read again;
    `index_policy` says whether it takes up the folder (--data_index). Raises OptionError for a folder that can't be
    looked into.
    """
    files, broken, passed_over = listing(folder)
    names = [name for name in files if is_image(name)]
    by_name = _by_caption_name(files)
    extension = _extension_in_use(names, by_name, caption_extension)
    base = os.path.join(folder, "")
    texts = [_caption_name(name, by_name, extension) for name in names]
    tasks = [(base + name, base + text if text else None) for name, text in zip(names, texts, strict=True)]
    extensions = (extension,) if any(texts) or class_tokens else (extension, *CAPTION_FALLBACKS)
    alone = tuple(base + name for name in captions_alone(files, texts, *extensions))
    del by_name
    if index is not None:
        index.use(folder, index_policy, len(files))
        index.keep_only(folder, files)
    results = read_all(tasks, folder.name, all_lines, index)
    images, uncaptioned, unreadable = [], [], []
    for (path, caption_path), (header, caption) in zip(tasks, results, strict=True):
        if isinstance(header, BadImage):
            broken[path] = str(header)
        elif isinstance(caption, UnicodeDecodeError):
            unreadable.append(caption_path)
        else:
            text = (class_tokens or "") if caption is None else caption
            images.append(
                ImageRecord(
                    path, header.size_wh, header.orientation, text, header.num_bytes, has_alpha=header.has_alpha
                )
            )
            uncaptioned += [] if caption_path else [path]
    return FolderContents(
        tuple(images),
        broken,
        tuple(uncaptioned),
        extension,
        tuple(unreadable),
        passed_over,
        alone=alone,
        sharing=tuple(base + name for name in _sharing(names, texts)),
    )


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


def caption_files(names: Iterable[str], files: Sequence[str], extension: str) -> dict[str, str | None]:
    """Image name -> name of its caption file among the `files` of the same folder; None where there is none."""
    by_name = _by_caption_name(files)
    return {name: _caption_name(name, by_name, extension) for name in names}


def captions_alone(files: Iterable[str], used: Iterable[str | None], *extensions: str) -> list[str]:
    """Those of a folder's `files` that are caption files by their name and not `used` by any image."""
    of_images, endings = frozenset(used), tuple(extension.lower() for extension in extensions)
    return [name for name in files if name not in of_images and name.lower().endswith(endings) and not is_hidden(name)]


def _sharing(names: Sequence[str], texts: Sequence[str | None]) -> list[str]:
    """The images whose caption file is that of another image too; `texts` are the images' caption files."""
    if len(set(texts) - {None}) == len(texts) - texts.count(None):
        return []
    uses = Counter(texts)
    return [name for name, text in zip(names, texts, strict=True) if text is not None and uses[text] > 1]


def _by_caption_name(files: Sequence[str]) -> dict[str, str]:
    """Name -> file, for names as they are, composed, and with their extension in lower case."""
    by_name = {name: name for name in files}
    odd = [name for name in files if not name.isascii() or name != name.lower()]  # others have one spelling
    for spelling in (composed, _with_small_extension):
        for name in odd:
            by_name.setdefault(spelling(name), name)
    return by_name


def _with_small_extension(name: str) -> str:
    stem, extension = os.path.splitext(composed(name))
    return stem + extension.lower()


def composed(name: str) -> str:
    """The one of Unicode's ways to write a name that most systems use; macOS writes accents as letters (UAX #15)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _extension_in_use(names: Sequence[str], files: Mapping[str, str], asked: str) -> str:
    for extension in (asked, *CAPTION_FALLBACKS):
        if any(_caption_name(name, files, extension) for name in names):
            return extension
    return asked


def _caption_name(image_name: str, files: Mapping[str, str], extension: str) -> str | None:
    """The caption file of an image, whose extension may be in capitals; `files` as of :func:`_by_caption_name`."""
    stem = os.path.splitext(image_name)[0]
    if (usual := stem + extension) in files:
        return files[usual]
    pieces = stem.split("_")
    stems = [stem, "_".join(pieces[:-FACE_PIECES])] if len(pieces) > FACE_PIECES else [stem]
    tries = [stem + ending for stem in stems for ending in (extension, extension.lower())]
    tries += [composed(name) for name in tries]
    return next((files[name] for name in tries if name in files), None)


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
