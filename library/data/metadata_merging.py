"""From text files beside images to a metadata file, and the cleaning of one: the work of the tools in finetune."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from library.data.caption_cleaning import clean_caption, clean_tags
from library.data.caption_names import CAPTION_FALLBACKS, caption_files, captions_alone
from library.data.listing import is_hidden, is_image, listing
from library.data.metadata_options import MergeOptions
from library.data.metadata_tables import image_tables, write_tables
from library.data.progress import progress
from library.data.slow_files import FileCalls
from library.data.sources import listed, read_text_file, table_of_broken
from library.options import OptionError, require
from library.wording import counted

logger = logging.getLogger(__name__)

FOLDER, OUTPUT, INPUT = "train_data_dir", "out_json", "in_json"  # names of positional values, as users see them
READ_TOGETHER = 256
CLEANING = {"tags": clean_tags, "caption": clean_caption}  # in the order in which they are told


class CaptionedImage(NamedTuple):
    """An image and the file with its text; None where there is none."""

    path: str
    text_path: str | None


# ---------------------------------------------------------------------------------------------- merging


def merge_texts(folder: Path, output: Path, field: str, options: MergeOptions) -> int:
    """Write a metadata file in which every image of the folder has its text as `field`; returns the entries written.

    Entries of the earlier file are kept and come first; of an image that has one, only `field` is replaced. Raises
    OptionError for images without text (as `options` say), texts that can't be read, and what can't be written.
    """
    require(os.path.isdir(folder), FOLDER, f"{str(folder)!r} is not a folder", "name the folder of images")
    images = find_images(folder, options.caption_extension, recursive=options.recursive)
    require(bool(images), FOLDER, f"no images in {folder}", "name the folder of images, or add --recursive")
    images = _with_text(images, options)
    earlier = options.in_json or (output if output.is_file() else None)
    if earlier is not None:
        logger.info("the entries of %s are kept", earlier)
    texts = _read_texts(images)
    if options.debug:
        for image in images:
            logger.info("%s: %r", image.path, texts[image.path])
    by_key = {_key(image.path, options.full_path): texts[image.path] for image in images}
    if not options.full_path:
        _report_equal_names(images)
    count = write_tables(output, _merged(earlier, by_key, field), OUTPUT)
    given = sum(text is not None for text in by_key.values())
    logger.info("%s: %s; %s of %d from %s", output, counted(count, "entry", "entries"), field, given, folder)
    return count


def find_images(folder: Path, extension: str, *, recursive: bool) -> list[CaptionedImage]:
    """The images in a folder, and in those below it, sorted by path; text files without an image get a line."""
    found: list[CaptionedImage] = []
    alone: list[str] = []
    for place in _folders(folder) if recursive else (folder,):
        contents = listing(place)
        if contents.broken:
            logger.warning("passed over:%s", table_of_broken(contents.broken))
        names = [name for name in contents.files if is_image(name)]
        texts = caption_files(names, contents.files, extension)
        base = os.path.join(place, "")
        found += [CaptionedImage(base + name, base + text if text else None) for name, text in texts.items()]
        alone += [base + name for name in captions_alone(contents.files, texts.values(), extension)]
    if alone:
        logger.warning("%s without an image: %s", counted(len(alone), f"{extension} file"), listed(alone))
    return sorted(found)


def _folders(folder: Path) -> Iterator[Path]:
    """The folder and those below it; hidden ones and links to folders are passed over."""
    for place, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if not is_hidden(name))
        yield Path(place)


def _with_text(images: list[CaptionedImage], options: MergeOptions) -> list[CaptionedImage]:
    """The images that become entries; raises OptionError with all that have no text, unless told otherwise."""
    missing = [image.path for image in images if image.text_path is None]
    if not missing:
        return images
    without = f"{len(missing):,} of {counted(len(images), 'image')} without a {options.caption_extension} file"
    if options.on_missing_text == "stop":
        way_out = "write them, or use --on_missing_text skip or empty"
        if hint := _other_extensions(missing, options.caption_extension):
            way_out = f"{hint}, {way_out}"
        raise OptionError("--caption_extension", f"{without}: {listed(missing)}", way_out)
    done = "left out" if options.on_missing_text == "skip" else "entered without a text"
    logger.warning("%s are %s: %s", without, done, listed(missing))
    kept = [image for image in images if image.text_path or options.on_missing_text == "empty"]
    require(bool(kept), "--caption_extension", without, "name the extension of the text files")
    return kept


def _other_extensions(paths: list[str], asked: str) -> str:
    """Which text files lie beside images that have none of the extension asked for."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = {
        extension: sum(os.path.isfile(stem + extension) for stem in stems)
        for extension in CAPTION_FALLBACKS
        if extension != asked.lower()
    }
    return ", ".join(f"try --caption_extension {name} ({count:,} are there)" for name, count in counts.items() if count)


def _key(path: str, full_path: bool) -> str:
    return path if full_path else os.path.splitext(os.path.basename(path))[0]


def _read_texts(images: list[CaptionedImage]) -> dict[str, str | None]:
    """By image: its whole text, stripped. Raises OptionError with all files that are not UTF-8."""
    texts: dict[str, str | None] = {}
    unreadable: list[str] = []
    with progress("reading texts", len(images), stays=True) as bar, FileCalls() as calls:
        for start in range(0, len(images), READ_TOGETHER):
            chunk = images[start : start + READ_TOGETHER]
            for image, text in zip(chunk, calls.results(_read_text, chunk), strict=True):
                if isinstance(text, UnicodeDecodeError):
                    unreadable.append(image.text_path or "")
                else:
                    texts[image.path] = text
            bar.update(len(chunk))
    if unreadable:
        raise OptionError(FOLDER, f"not UTF-8: {listed(unreadable)}", "save these files as UTF-8")
    if empty := [path for path, text in texts.items() if text == ""]:
        logger.warning("%s of %s empty: %s", len(empty), counted(len(texts), "text"), listed(empty))
    return texts


def _read_text(image: CaptionedImage) -> str | None | UnicodeDecodeError:
    try:
        return None if image.text_path is None else read_text_file(image.text_path).strip()
    except UnicodeDecodeError as error:
        return error


def _report_equal_names(images: list[CaptionedImage]) -> None:
    uses = Counter(_key(image.path, False) for image in images)
    if equal := [image.path for image in images if uses[_key(image.path, False)] > 1]:
        problem = "share their names but for the extension: the last one's text is used for all of a name"
        logger.warning("%s %s; use --full_path: %s", counted(len(equal), "image"), problem, listed(equal))


def _merged(earlier: Path | None, texts: Mapping[str, str | None], field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The earlier file's entries with their texts, then the images that it doesn't have."""
    done: set[str] = set()
    count = 0
    for key, table, place in image_tables(earlier, INPUT) if earlier is not None else ():
        count += 1
        if key in texts:
            done.add(key)
        yield key, _with_field(_checked(table, place), field, texts.get(key))
    if count and not done:
        problem = "none of its %s is one of these images: was it made with another --full_path or folder?"
        logger.warning("%s: " + problem, earlier, counted(count, "entry", "entries"))
    for key, text in texts.items():
        if key not in done:
            yield key, _with_field({}, field, text)


def _with_field(table: dict[str, Any], field: str, text: str | None) -> dict[str, Any]:
    return table if text is None else {**table, field: text}


def _checked(table: Any, place: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise OptionError(place, f"{table!r} is not a table", 'write {"caption": "..."} in its place')
    return table


# ---------------------------------------------------------------------------------------------- cleaning


def clean_metadata(source: Path, output: Path, *, shows_changes: bool) -> int:
    """Write the metadata with tags and captions cleaned; returns how many entries changed."""
    num_changed = 0
    missing: dict[str, list[str]] = {field: [] for field in CLEANING}

    def cleaned() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal num_changed
        with progress("cleaning", None, stays=True, unit="entry") as bar:
            for key, table, place in image_tables(source, INPUT):
                texts = _texts_of(_checked(table, place), place)
                for field in [field for field in CLEANING if field not in texts]:
                    missing[field].append(key)
                new = {field: CLEANING[field](text) for field, text in texts.items()}
                num_changed += new != texts
                for field in [field for field in new if shows_changes and new[field] != texts[field]]:
                    logger.info("%s: %s: %r becomes %r", key, field, texts[field], new[field])
                yield key, {**table, **new}
                bar.update()

    count = write_tables(output, cleaned(), OUTPUT)
    for field, keys in missing.items():
        if keys:
            logger.info("%s no %s: %s", counted(len(keys), "entry has", "entries have"), field, listed(keys))
    logger.info("%s: %s of %s changed", output, num_changed, counted(count, "entry", "entries"))
    return num_changed


def _texts_of(table: dict[str, Any], place: str) -> dict[str, str]:
    """What is to be cleaned, of what there is."""
    texts = {field: table[field] for field in CLEANING if table.get(field) is not None}
    for field, text in texts.items():
        require(isinstance(text, str), place, f"{field} {text!r} is not a text")
    return texts
