"""How a report reads, as text and as a page."""

from __future__ import annotations

import re

from library.data.findings import Box
from library.train.report import (
    Bar,
    Curve,
    Facts,
    Gallery,
    Picture,
    Problem,
    Report,
    Section,
    Table,
    brief_text,
    full_text,
    warnings_of,
)
from library.train.report_page import PICTURES, page, shown_pictures

PIXEL = "data:image/jpeg;base64,AAAA"


def report(**changes) -> Report:
    fields = {
        "title": "run: <plan>",
        "subtitle": "today",
        "tiles": (("steps", "12", "2 epochs"),),
        "problems": (
            Problem(True, "two & two", "add them", Gallery.of([Picture("/data/5_a/x<y.png", "first\ncaption")])),
            Problem(False, "just so"),
            Problem(True, "odd", lines=("a", "b", "c", "d")),
        ),
        "sections": (
            Section("Numbers", (Facts((("short", "1"), ("much longer", "2")), brief=True),)),
            Section(
                "Rows",
                (
                    Table(("name", "share"), tuple((f"row {i}", Bar(f"{i}%", i / 100)) for i in range(12)),
                          numbers=(1,), brief=True),
                    Curve("rate", (("unet", ((1, 0.0), (2, 1e-4), (9, 0.0))),)),
                    Gallery.of([Picture("/data/5_a/z.png", kept=Box(0.1, 0, 0.8, 1))], "pictures", is_only_shown=True),
                ),
            ),
        ),
    }  # fmt: skip
    return Report(**{**fields, **changes})


def test_columns_are_aligned():
    lines = full_text(report()).splitlines()
    assert "  short        1" in lines and "  much longer  2" in lines
    assert "  row 3      3%" in lines and "  row 11    11%" in lines


def test_the_screen_gets_the_short_form():
    lines = brief_text(report()).splitlines()
    assert "  and 4 more rows" in lines and not any("row 9" in line for line in lines)
    assert warnings_of(report().problems) == ["two & two (5_a/x<y.png); add them", "odd (a; b; c and 1 more)"]


def test_the_whole_text_has_problems_first():
    text = full_text(report())
    assert text.index("WARNING 1: two & two") < text.index("note 2: just so") < text.index("Numbers")
    assert "5_a/x<y.png: first" in text and "z.png" not in text


def test_the_page_needs_nothing_else_and_escapes_what_it_is_told():
    made = page(report(), {"/data/5_a/x<y.png": PIXEL, "/data/5_a/z.png": PIXEL})
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", made)
    assert sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert "http" not in made and "@import" not in made and "url(" not in made
    assert "run: &lt;plan&gt;" in made and "x&lt;y.png" in made and "<plan>" not in made
    assert made.count("<img") == 2 and "width:80.00%" in made


def test_pictures_without_a_thumbnail_are_named():
    made = page(report(), {}).replace("<wbr>", "")
    assert "<img" not in made and "5_a/x&lt;y.png" in made and "5_a/z.png" in made


def test_a_curve_is_drawn_from_zero_to_the_peak():
    made = page(report(), {})
    (points,) = re.findall(r'points="([^"]*)"', made)
    first, peak, last = (tuple(map(float, point.split(","))) for point in points.split())
    assert first[1] == last[1] > peak[1] and first[0] < peak[0] < last[0]


def test_one_step_makes_a_curve():
    made = page(report(sections=(Section("S", (Curve("rate", (("unet", ((1, 0.0),)),)),)),)), {})
    assert "<polyline" in made and "nan" not in made


def test_problems_come_first_among_the_pictures_shown():
    crowd = [Picture(f"/data/a/{index}.png") for index in range(2 * PICTURES)]
    made = report(
        problems=(Problem(True, "odd", gallery=Gallery.of([Picture("/data/a/399.png")])),),
        sections=(Section("S", (Gallery.of(crowd),)),),
    )
    shown = shown_pictures(made)
    assert shown[0] == "/data/a/399.png" and len(shown) == len(set(shown)) == PICTURES


def test_long_names_break_at_their_joints_and_equal_curves_are_both_seen():
    curves = Curve("rate", (("unet", ((1, 1e-4), (9, 1e-4))), ("text encoder", ((1, 1e-4), (9, 1e-4)))))
    rows = Table(("file",), (("a-long_name-of-a-file.safetensors",),))
    made = page(report(sections=(Section("S", (curves, rows)),)), {})
    assert "a-<wbr>long_<wbr>name-<wbr>of-<wbr>a-<wbr>file.safetensors" in made
    assert 'class="line1"' in made and "polyline.line1 { stroke-dasharray" in made
