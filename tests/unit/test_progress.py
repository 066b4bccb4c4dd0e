"""Progress on a screen that is no terminal."""

from __future__ import annotations

import io
import sys

from library.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(screen: io.StringIO, monkeypatch) -> str:
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(total=3, desc="steps") as bar:
        for _ in range(3):
            for _ in progress_bar(iterable=[1, 2], desc="inner", is_inner=True):
                pass
            bar.update()
            bar.set_postfix({"loss": "0.5"}, refresh=False)
    return screen.getvalue()


def test_a_file_gets_lines(monkeypatch):
    (line,) = shown(io.StringIO(), monkeypatch).splitlines()
    assert line.startswith("steps: 3 of 3 in 00:00") and line.endswith("loss=0.5") and "\r" not in line


def test_a_terminal_gets_bars(monkeypatch):
    text = shown(Terminal(), monkeypatch)
    assert "inner" in text and "3/3" in text and "\r" in text


def test_bars_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("PROGRESS_BARS", "1")
    assert "\r" in shown(io.StringIO(), monkeypatch)


def test_what_has_no_end_known_tells_none(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(total=None, desc="reading", unit="entry") as bar:
        bar.update(3)
    assert screen.getvalue().startswith("reading: 3 in 00:00") and "?" not in screen.getvalue().partition("in")[0]
    assert "entry/s" in screen.getvalue()
