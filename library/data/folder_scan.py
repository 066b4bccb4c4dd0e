"""The images of one folder, with sizes and captions: from the index where it knows them, else from the files.

Shape letters: N images of the folder, M of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from library.data.caption_names import (
    CAPTION_FALLBACKS,
    Spellings,
    caption_name,
    captions_alone,
    extension_in_use,
    sharing,
)
from library.data.columns import Paths, Texts
from library.data.folder_contents import FolderContents
from library.data.headers import PACKED, BadImage, Header
from library.data.index import DataIndex, Fact, FolderIndex, stamps_of
from library.data.index_columns import Match
from library.data.listing import is_image, listing
from library.data.record_table import RecordTable
from library.data.sources import read_all

HEADER_COLUMNS = np.dtype([("wh", "<u4", 2), ("orientation", "u1"), ("alpha", "u1"), ("bytes", "<u8")])


def scan_folder(
    folder: Path,
    *,
    caption_extension: str,
    class_tokens: str | None,
    all_lines: bool = False,
    index: DataIndex | None = None,
    index_policy: str = "off",
) -> FolderContents:
    """The images directly in `folder`, sorted by name, with sizes and captions.

    Captions are the first line with text of their files, or, with `all_lines`, all those lines. An image without a
    caption file gets `class_tokens`, or the empty caption. When no image has a caption file of `caption_extension` but
    there are .txt or .caption files, those are used. What the `index` knows of the folder's files is not read again;
    `index_policy` says whether it takes up the folder (--data_index). Raises OptionError for a folder that can't be
    looked into.
    """
    files, broken, passed_over, links = listing(folder)
    names = [name for name in files if is_image(name)]
    spellings = Spellings(files)
    extension = extension_in_use(names, spellings, caption_extension)
    texts = [caption_name(name, spellings, extension) for name in names]
    base = os.path.join(folder, "")
    extensions = (extension,) if any(texts) or class_tokens else (extension, *CAPTION_FALLBACKS)
    alone = tuple(base + name for name in captions_alone(files, texts, *extensions))
    index = DataIndex() if index is None else index
    index.use(folder, index_policy, len(files))
    reading = _Reading(base, names, texts, class_tokens or "", all_lines=all_lines)
    of_folder = index.in_folder(folder)
    unarranged = None if of_folder is None else of_folder.num_unarranged
    if of_folder is not None and unarranged is not None and (not reading.take_known(of_folder) or unarranged):
        of_folder.keep_only(files)
    del files, spellings
    unreadable = reading.read_rest(folder.name, index, broken)
    table, is_captioned_N = reading.table(links)
    if reading.stamps_N3 is not None:
        index.saw(base, table.names, reading.stamps_N3[reading.is_good_N])
    return FolderContents(
        table,
        broken,
        Paths(base, table.names, np.flatnonzero(~is_captioned_N)),
        extension,
        tuple(unreadable),
        passed_over,
        alone=alone,
        sharing=tuple(base + name for name in sharing(names, texts)),
    )


class _Reading:
    """What is known so far of a folder's images, in the order of their names."""

    def __init__(
        self, base: str, names: list[str], texts: list[str | None], class_tokens: str, *, all_lines: bool
    ) -> None:
        count = len(names)
        self.base, self.names, self.texts, self.all_lines = base, names, texts, all_lines
        self.headers_N = np.zeros(count, HEADER_COLUMNS)
        self.is_good_N = np.zeros(count, bool)  # header and caption are known
        self.stamps_N3: np.ndarray | None = None
        self._captions = bytearray(class_tokens.encode())
        self._starts_N = np.zeros(count, np.int64)  # of the caption in these bytes: the class, until another is known
        self._ends_N = np.full(count, len(self._captions), np.int64)

    def take_known(self, index: FolderIndex) -> bool:
        """Take from the index's columns what holds; returns whether they know nothing of files that are gone."""
        named = [0, 0]
        self.stamps_N3 = stamps_of(self.base, self.names)
        has_header_N = np.zeros(len(self.names), bool)
        for match in index.matches(Fact.HEADER, self.names, self.stamps_N3):
            named[0] += len(match.part.names) - match.num_named
            packed = match.part.fixed(PACKED.size)
            if packed is not None:
                self.headers_N[match.files_M] = packed.view(HEADER_COLUMNS)[match.rows_M, 0]
                has_header_N[match.files_M] = True
        has_text_N = np.fromiter((text is None for text in self.texts), bool, len(self.texts))
        images_M = np.flatnonzero(~has_text_N)
        of_images = [text for text in self.texts if text is not None]
        if any(first > second for first, second in zip(of_images, of_images[1:], strict=False)):
            order = sorted(range(len(of_images)), key=of_images.__getitem__)
            images_M, of_images = images_M[order], [of_images[place] for place in order]
        for match in index.matches(Fact.CAPTION, of_images, stamps_of(self.base, of_images)):
            named[1] += len(match.part.names) - match.num_named
            if self._take_captions(match, images_M[match.files_M]):
                has_text_N[images_M[match.files_M]] = True
        self.is_good_N = has_header_N & has_text_N
        return not any(named)

    def _take_captions(self, match: Match, images_M: np.ndarray) -> bool:
        content, offset = match.part.values.content, len(self._captions)
        if not content.isascii():
            try:
                content.decode()
            except UnicodeDecodeError:
                return False
        ends = match.part.values.ends_N.astype(np.int64)
        starts_M, ends_M = (ends - match.part.values.lengths_N)[match.rows_M], ends[match.rows_M]
        if not self.all_lines and b"\n" in content:
            lines = (
                content.find(b"\n", start, end) for start, end in zip(starts_M.tolist(), ends_M.tolist(), strict=True)
            )
            ends_M = np.fromiter(
                (line if line >= 0 else end for line, end in zip(lines, ends_M.tolist(), strict=True)),
                np.int64,
                len(ends_M),
            )
        self._captions += content
        self._starts_N[images_M], self._ends_N[images_M] = starts_M + offset, ends_M + offset
        return True

    def read_rest(self, name: str, index: DataIndex, broken: dict[str, str]) -> list[str]:
        """Read what the columns don't know; returns caption files that can't be read, and notes broken images."""
        rest = np.flatnonzero(~self.is_good_N).tolist()
        texts = [self.texts[row] for row in rest]
        tasks = [
            (self.base + self.names[row], text and self.base + text) for row, text in zip(rest, texts, strict=True)
        ]
        unreadable = []
        for row, task, (header, caption) in zip(rest, tasks, read_all(tasks, name, self.all_lines, index), strict=True):
            if isinstance(header, BadImage):
                broken[task[0]] = str(header)
            elif isinstance(caption, UnicodeDecodeError):
                unreadable.append(task[1])
            else:
                self._note(row, header, caption)
        return unreadable

    def _note(self, row: int, header: Header, caption: str | None) -> None:
        self.headers_N[row] = (header.size_wh, header.orientation, header.has_alpha, header.num_bytes)
        self.is_good_N[row] = True
        if caption is not None:
            self._starts_N[row] = len(self._captions)
            self._captions += caption.encode()
            self._ends_N[row] = len(self._captions)

    def table(self, links: frozenset[str]) -> tuple[RecordTable, np.ndarray]:
        """(the images that can be used, whether each has a caption file)."""
        rows = np.flatnonzero(self.is_good_N)
        headers = self.headers_N[rows]
        names = self.names if len(rows) == len(self.names) else [self.names[row] for row in rows.tolist()]
        captioned = np.fromiter((self.texts[row] is not None for row in rows.tolist()), bool, len(rows))
        table = RecordTable(
            self.base,
            Texts.of(names),
            headers["wh"].copy(),
            headers["orientation"].copy(),
            headers["alpha"].astype(bool),
            headers["bytes"].astype(np.int64),
            self._joined_captions(rows),
            links,
        )
        return table, captioned

    def _joined_captions(self, rows: np.ndarray) -> Texts:
        starts, ends = self._starts_N[rows], self._ends_N[rows]
        first = int(starts[0]) if len(rows) else 0
        if len(rows) and (starts[1:] == ends[:-1]).all():
            return Texts.by_lengths(bytes(memoryview(self._captions)[first : int(ends[-1])]), ends - starts)
        pieces = (bytes(self._captions[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
        return Texts.by_lengths(b"".join(pieces), ends - starts)
