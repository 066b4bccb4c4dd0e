"""A report as a document: sections of facts, tables, pictures and curves, and how it reads as plain text.

What it says is decided in plan_report.py; how it looks in a browser in report_page.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from library.data.findings import Box
from library.data.sources import with_folder
from library.wording import aligned as aligned

LISTED = 20  # pictures named per block in the text; the page shows as many as it has thumbnails for
NAMED = 3  # pictures, or lines, of a problem on the screen
LISTED_BRIEFLY = 8  # rows of a table on the screen


@dataclass(frozen=True)
class Bar:
    """A number with its share (0-1) of a whole, which a page draws."""

    text: str
    share: float

    def __str__(self) -> str:
        return self.text


Cell = str | Bar


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: tuple[tuple[str, str], ...]
    brief: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: tuple[int, ...] = ()  # columns that are set to the right
    brief: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Picture:
    """One picture, what there is to say of it, and which part of it is trained on."""

    path: str
    note: str = ""
    kept: Box | None = None

    @property
    def name(self) -> str:
        """Folder and file."""
        return with_folder(self.path)


@dataclass(frozen=True)
class Gallery:
    """Pictures, maybe in groups to be looked at side by side."""

    groups: tuple[tuple[Picture, ...], ...]
    title: str = ""
    is_grouped: bool = False
    more: int = 0  # pictures that are not listed
    is_only_shown: bool = False  # not in the text

    @classmethod
    def of(cls, pictures: Iterable[Picture], title: str = "", **more: Any) -> Gallery:
        """Pictures one by one; `more` are further fields."""
        return cls(tuple((picture,) for picture in pictures), title, **more)

    @property
    def pictures(self) -> list[Picture]:
        return [picture for group in self.groups for picture in group]


@dataclass(frozen=True)
class Curve:
    """Values over the steps of the run: lines by name, as points (step, value)."""

    title: str
    lines: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]


@dataclass(frozen=True)
class Problem:
    """Something that may be wrong, and what can be done about it."""

    is_warning: bool  # else only a note
    title: str  # one sentence
    advice: str = ""
    gallery: Gallery | None = None
    lines: tuple[str, ...] = ()
    more: int = 0  # beyond those lines

    @property
    def examples(self) -> str:
        """The first of what it is about, in one line."""
        known = [picture.name for picture in self.gallery.pictures] if self.gallery else self.lines
        names = list(dict.fromkeys(known))
        number = len(names) + (self.gallery.more if self.gallery else self.more)
        more = f" and {number - NAMED} more" if number > NAMED else ""
        return f"{(', ' if self.gallery else '; ').join(names[:NAMED])}{more}"


Block = Facts | Table | Text | Gallery | Curve


@dataclass(frozen=True)
class Section:
    """One subject. A block of it goes to the screen if it is `brief`."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """What a run will do and what its data are like."""

    title: str
    subtitle: str
    tiles: tuple[tuple[str, str, str], ...]  # the run in a few numbers: what, how much, more of it
    problems: tuple[Problem, ...]
    sections: tuple[Section, ...]


# ---------------------------------------------------------------------------------------------- plain text


def brief_text(report: Report) -> str:
    """What goes to the screen before a run: the sections' brief blocks."""
    blocks = [block for section in report.sections for block in section.blocks if getattr(block, "brief", False)]
    return "\n".join(line for block in blocks for line in _lines(block, LISTED_BRIEFLY))


def warnings_of(problems: Iterable[Problem]) -> list[str]:
    """What seems wrong, a line each."""
    return [
        f"{problem.title}{f' ({examples})' if (examples := problem.examples) else ''}"
        f"{f'; {problem.advice}' if problem.advice else ''}"
        for problem in problems
        if problem.is_warning
    ]


def full_text(report: Report) -> str:
    """Everything, for the log and for a file of its own."""
    lines = [report.title, report.subtitle, ""]
    for number, problem in enumerate(report.problems, 1):
        lines.append(f"{'WARNING' if problem.is_warning else 'note'} {number}: {problem.title}")
        lines += [f"  {problem.advice}"] if problem.advice else []
        lines += [f"    {line}" for line in problem.lines]
        lines += _indented(_lines(problem.gallery, LISTED)) if problem.gallery else []
    if report.problems:
        lines.append("")
    for section in report.sections:
        lines += [section.title, "-" * len(section.title)]
        for block in section.blocks:
            lines += _lines(block, None)
        lines.append("")
    return "\n".join(lines)


def _lines(block: Block, most: int | None) -> list[str]:
    if isinstance(block, Facts):
        return aligned([tuple(row) for row in block.rows])
    if isinstance(block, Table) and not block.rows:
        return []
    if isinstance(block, Table):
        rows = block.rows if most is None else block.rows[:most]
        more = len(block.rows) - len(rows)
        if not rows:
            return []
        return [*aligned([block.header, *rows], block.numbers), *([f"  and {more} more rows"] if more else [])]
    if isinstance(block, Text):
        return [f"  {block.text}"]
    if isinstance(block, Curve) or (isinstance(block, Gallery) and block.is_only_shown):
        return []
    return _gallery_lines(block, LISTED if most is None else most)


def _gallery_lines(gallery: Gallery, most: int) -> list[str]:
    title = [f"  {gallery.title}:"] if gallery.title else []
    if gallery.is_grouped:
        listed = [", ".join(picture.name for picture in group) for group in gallery.groups]
    else:
        listed = [f"{picture.name}: {picture.note}" if picture.note else picture.name for picture in gallery.pictures]
    rest = max(0, len(listed) - most) + gallery.more
    more = [f"    and {rest} more"] if rest else []
    return [*title, *(f"    {line}" for line in listed[:most]), *more]


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
