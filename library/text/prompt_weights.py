"""Emphasis in prompts: "(word:1.2)", "(word)", "[word]" and BREAK, as the trade's user interfaces read them."""

from __future__ import annotations

import re

ROUND = 1.1  # factor of (text)
SQUARE = 1 / 1.1  # factor of [text]
LARGEST_EMPHASIS = 1e6  # beyond it no arithmetic works
LARGEST_PRODUCT = 1e30  # that brackets are multiplied to
DEEPEST = 160  # brackets inside each other that count: 1.1 to that power is above LARGEST_EMPHASIS
BREAK = ("BREAK", -1.0)  # the segment that stands for the word BREAK: what follows starts a new window of tokens

TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>\\|:|[^\\()\[\]:]+)"
)


def parse_prompt_weights(text: str) -> list[tuple[str, float]]:
    """Segments of `text` with their weights; neighbours of equal weight are one segment.

    (x) multiplies by 1.1, [x] divides by 1.1, (x:w) multiplies by w; brackets nest, and unclosed ones act until the
    end. A backslash before a bracket or a backslash makes it text; a closing bracket without an opening one is text.
    The word BREAK, anywhere, becomes the segment ("BREAK", -1.0). Empty text gives [("", 1.0)]. Brackets deeper than
    DEEPEST change nothing more.
    """
    segments: list[list] = []  # [text, weight]
    open_round: list[int] = []  # index of the first segment inside each open bracket
    open_square: list[int] = []

    def close(opened: list[int], factor: float) -> None:
        start = opened.pop()
        if len(opened) >= DEEPEST:
            return
        for segment in segments[start:]:
            if tuple(segment) != BREAK:
                segment[1] = _bounded(segment[1] * _bounded(factor))

    for match in TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "bracket" and token in "([":
            (open_round if token == "(" else open_square).append(len(segments))
        elif kind == "weight" and open_round:
            close(open_round, float(match["weight"]))
        elif token == ")" and open_round:
            close(open_round, ROUND)
        elif token == "]" and open_square:
            close(open_square, SQUARE)
        else:
            _append_text(segments, match["escaped"] or token)
    for opened, factor in ((open_round, ROUND), (open_square, SQUARE)):
        while opened:
            close(opened, factor)
    return _merged(segments)


def _bounded(number: float) -> float:
    return min(max(number, -LARGEST_PRODUCT), LARGEST_PRODUCT)


def _append_text(segments: list[list], text: str) -> None:
    for index, part in enumerate(text.split(BREAK[0])):
        if index:
            segments.append(list(BREAK))
        segments.append([part, 1.0])


def _merged(segments: list[list]) -> list[tuple[str, float]]:
    merged: list[tuple[list[str], float]] = []
    for text, weight in segments or [["", 1.0]]:
        if merged and merged[-1][1] == weight and (text, weight) != BREAK:
            merged[-1][0].append(text)
        else:
            merged.append(([text], weight))
    return [("".join(texts), weight) for texts, weight in merged]
