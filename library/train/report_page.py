"""A report as one HTML file that needs nothing else: no script from elsewhere, no style, no font, no picture."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from library.train.report import (
    Bar,
    Cell,
    Curve,
    Facts,
    Gallery,
    Picture,
    Problem,
    Report,
    Section,
    Table,
    Text,
)
from library.wording import counted

TEMPLATE = Path(__file__).with_name("report_page.html")
PICTURES = 240  # of the whole page
OF_A_PROBLEM = 24
UNFOLDED_LINES = 8
OPEN_AT_FIRST = 48  # pictures of a section that are not folded away
CURVE_WH = (640, 150)
MARGINS = (64, 30, 12, 24)  # of a curve: left, top, right, bottom


def shown_pictures(report: Report) -> list[str]:
    """Paths of the pictures that the page shows, the most telling first."""
    paths: dict[str, None] = {}
    for problem in report.problems:
        if problem.gallery is not None:
            paths |= dict.fromkeys(picture.path for picture in problem.gallery.pictures[:OF_A_PROBLEM])
    first = dict.fromkeys(list(paths)[: PICTURES // 2])
    galleries = [block for section in report.sections for block in section.blocks if isinstance(block, Gallery)]
    return list(first | dict.fromkeys(picture.path for gallery in galleries for picture in gallery.pictures))[:PICTURES]


def page(report: Report, thumbnails: Mapping[str, str]) -> str:
    """The whole file. `thumbnails` are data URLs by path; pictures without one are named."""
    warnings = sum(problem.is_warning for problem in report.problems)
    parts = [_tiles(report), _problems(report.problems, thumbnails)]
    parts += [_section(section, thumbnails) for section in report.sections]
    links = "".join(f'<a href="#{_anchor(section.title)}">{escape(section.title)}</a>' for section in report.sections)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(report.title),
        subtitle=escape(report.subtitle),
        links=f'<a href="#problems">{"Problems" if warnings else "Notes"}</a>{links}' if report.problems else links,
        body="\n".join(parts),
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _tiles(report: Report) -> str:
    tiles = (
        f'<div class="tile"><span class="what">{escape(what)}</span><span class="value">{escape(value)}</span>'
        f'<span class="more">{escape(more)}</span></div>'
        for what, value, more in report.tiles
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


# ---------------------------------------------------------------------------------------------- problems


def _problems(problems: Sequence[Problem], thumbnails: Mapping[str, str]) -> str:
    if not problems:
        return '<section id="problems"><p class="fine">Nothing seems wrong.</p></section>'
    cards = "".join(_problem(problem, thumbnails) for problem in problems)
    return f'<section id="problems">{cards}</section>'


def _problem(problem: Problem, thumbnails: Mapping[str, str]) -> str:
    advice = f'<p class="advice">{escape(_sentence(problem.advice))}</p>' if problem.advice else ""
    lines = [f"<li>{_breakable(line)}</li>" for line in problem.lines]
    more = f'<ul class="lines">{"".join(lines)}</ul>' if lines else ""
    if problem.gallery is not None:
        more += _gallery(problem.gallery, thumbnails, most=OF_A_PROBLEM)
    kind = "warning" if problem.is_warning else "note"
    details = more
    if problem.gallery is not None or len(lines) > UNFOLDED_LINES:
        shown = counted(len(problem.gallery.pictures), "picture") if problem.gallery else counted(len(lines), "line")
        opened = " open" if problem.is_warning else ""
        details = f"<details{opened}><summary>{shown}</summary>{more}</details>"
    return (
        f'<article class="problem {kind}"><h3><span class="mark">{kind}</span>{escape(_sentence(problem.title))}</h3>'
        f"{advice}{details}</article>"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', ')')) else '.'}"


def _breakable(text: str) -> str:
    """Escaped, and long names broken at their joints rather than anywhere."""
    return re.sub(r"(?<=\w)([-_/\\\\])(?=\w)", r"\1<wbr>", escape(text))


# ---------------------------------------------------------------------------------------------- blocks


def _section(section: Section, thumbnails: Mapping[str, str]) -> str:
    num_open = 0
    blocks = ""
    for block in section.blocks:
        if isinstance(block, Gallery):
            blocks += _folding(block, thumbnails, is_open=num_open < OPEN_AT_FIRST)
            num_open += len(block.pictures)
        else:
            blocks += _block(block)
    return f'<section id="{_anchor(section.title)}"><h2>{escape(section.title)}</h2>{blocks}</section>'


def _folding(gallery: Gallery, thumbnails: Mapping[str, str], *, is_open: bool) -> str:
    opened = " open" if is_open else ""
    pictures = _gallery(gallery, thumbnails)
    return f"<details{opened}><summary>{escape(gallery.title)}</summary>{pictures}</details>"


def _block(block: Facts | Table | Text | Curve) -> str:
    if isinstance(block, Facts):
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{_breakable(value)}</dd>" for name, value in block.rows)
        return f"<dl>{rows}</dl>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    return _curve(block)


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    numbers = frozenset(table.numbers)

    def cells(row: Iterable[Cell], tag: str) -> str:
        return "".join(_cell(cell, tag, is_number=column in numbers) for column, cell in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    head = f"<thead><tr>{cells(table.header, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _cell(cell: Cell, tag: str, *, is_number: bool) -> str:
    kind = ' class="number"' if is_number else ""
    if not isinstance(cell, Bar):
        return f"<{tag}{kind}>{_breakable(cell)}</{tag}>"
    width = f"{100 * min(max(cell.share, 0.0), 1.0):.1f}%"
    return f'<{tag}{kind}><span class="bar" style="--share:{width}">{escape(cell.text)}</span></{tag}>'


# ---------------------------------------------------------------------------------------------- pictures


def _gallery(gallery: Gallery, thumbnails: Mapping[str, str], most: int | None = None) -> str:
    """Pictures with a thumbnail first, then the names of those without."""
    groups = []
    room = most
    named: list[str] = []
    for group in gallery.groups:
        seen = [picture for picture in group if picture.path in thumbnails]
        if room is not None and len(seen) > room:
            seen = []
        named += [picture.name for picture in group if picture not in seen]
        room = None if room is None else room - len(seen)
        figures = "".join(_figure(picture, thumbnails[picture.path]) for picture in seen)
        groups.append(f'<div class="group">{figures}</div>' if gallery.is_grouped and figures else figures)
    rest = ", ".join(map(_breakable, named))
    if gallery.more:
        rest = f"{rest}{', ' if rest else ''}and {gallery.more} more"
    kind = "pictures grouped" if gallery.is_grouped else "pictures"
    return f'<div class="{kind}">{"".join(groups)}</div>' + (f'<p class="rest">{rest}</p>' if rest else "")


def _figure(picture: Picture, url: str) -> str:
    """A thumbnail; what the cut leaves out is dimmed."""
    kept = ""
    if picture.kept is not None and picture.kept.width * picture.kept.height < 0.995:
        left, top, width, height = (f"{100 * share:.2f}%" for share in picture.kept)
        kept = f'<i class="kept" style="left:{left};top:{top};width:{width};height:{height}"></i>'
    facts, _, caption = picture.note.partition("\n")
    text = f'<span class="facts">{escape(facts)}</span>' if facts else ""
    text += f'<span class="caption" title="{escape(caption)}">{escape(caption)}</span>' if caption else ""
    name = _breakable(os.path.basename(picture.path))
    return (
        f'<figure><span class="box"><span class="frame"><img src="{url}" alt="" loading="lazy">{kept}</span></span>'
        f'<figcaption><b title="{escape(picture.path)}">{name}</b>{text}</figcaption>'
        "</figure>"
    )


# ---------------------------------------------------------------------------------------------- curves


def _curve(curve: Curve) -> str:
    """Lines over the steps as inline SVG, from 0 to the highest value."""
    (width, height), (left, top, right, bottom) = CURVE_WH, MARGINS
    last = max(step for _, points in curve.lines for step, _ in points)
    highest = max(value for _, points in curve.lines for _, value in points) or 1.0
    inner_w, inner_h = width - left - right, height - top - bottom

    def place(step: int, value: float) -> str:
        x = left + inner_w * ((step - 1) / max(last - 1, 1))
        return f"{x:.1f},{top + inner_h * (1 - value / highest):.1f}"

    lines = "".join(
        f'<polyline class="line{index % 4}" points="{" ".join(place(*point) for point in _drawable(points, last))}">'
        f"<title>{escape(name)}</title></polyline>"
        for index, (name, points) in enumerate(curve.lines)
    )
    grid = "".join(
        f'<line x1="{left}" x2="{width - right}" y1="{top + inner_h * part}" y2="{top + inner_h * part}"/>'
        f'<text x="{left - 6}" y="{top + inner_h * part + 4}" class="y">{highest * (1 - part):.2g}</text>'
        for part in (0.0, 0.5, 1.0)
    )
    steps = "".join(
        f'<text x="{left + inner_w * part}" y="{height - 6}" class="x">{round(1 + (last - 1) * part):,}</text>'
        for part in ((0.0, 0.5, 1.0) if last > 2 else (0.0, 1.0)[:last])
    )
    names = "".join(f'<li class="line{index % 4}">{escape(name)}</li>' for index, (name, _) in enumerate(curve.lines))
    return (
        f'<figure class="curve"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(curve.title)}">'
        f"{grid}{steps}{lines}</svg><figcaption>{escape(curve.title)}<ul>{names}</ul></figcaption></figure>"
    )


def _drawable(points: Sequence[tuple[int, float]], last: int) -> Sequence[tuple[int, float]]:
    """A run of one step as a line across the whole width."""
    return [*points, (2, points[0][1])] if last == 1 else points
