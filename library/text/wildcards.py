"""Wildcards in captions: {a|b|c} stands for one of its alternatives, drawn anew each time.

{{ and }} are braces as text. Groups nest; alternatives may be empty. An opening brace that is never closed, a closing
one that closes nothing and a group without content are text.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

ESCAPES = {"{{": "{", "}}": "}"}
TOKEN = re.compile(r"\{\{|\}\}|[{}|]|[^{}|]+")


@dataclass
class _Group:
    """A list of alternatives, each a list of texts and groups; `escaped` counts the {{ in it still to be matched."""

    alternatives: list[list[str | _Group]] = field(default_factory=lambda: [[]])
    escaped: int = 0


def expand_wildcards(text: str, draw: random.Random) -> str:
    """`text` with one alternative of each group; groups inside alternatives not taken draw nothing."""
    if "{" not in text and "}" not in text:
        return text
    chosen: list[str] = []
    ahead = [*reversed(_parsed(text))]  # the next one last; groups may nest deeper than Python's calls can
    while ahead:
        part = ahead.pop()
        if isinstance(part, str):
            chosen.append(part)
        else:
            ahead.extend(reversed(draw.choice(part.alternatives)))
    return "".join(chosen)


def _parsed(text: str) -> list[str | _Group]:
    stack = [_Group()]  # the first stands for the whole text, in which | is text
    position = 0
    while match := TOKEN.match(text, position):
        group, token, is_inside = stack[-1], match.group(), len(stack) > 1
        group.escaped += token == "{{"
        if token == "}}" and is_inside:
            if group.escaped:
                group.escaped -= 1
            else:
                token = "}"  # closes this group; the next brace is looked at anew, as in {a|{b|c}}
        if token == "{":
            stack.append(_Group())
        elif token == "}" and is_inside:
            _close(stack)
        elif token == "|" and is_inside:
            group.alternatives.append([])
        else:
            _add(group, ESCAPES.get(token, token))
        position += len(token)
    whole, *left_open = stack  # those stand inside each other, each at the end of the one before
    for group in left_open:
        _add_as_text(whole, group)
    return whole.alternatives[0]


def _close(stack: list[_Group]) -> None:
    group = stack.pop()
    _add(stack[-1], "{}" if group.alternatives == [[]] else group)


def _add_as_text(whole: _Group, group: _Group) -> None:
    """What was taken for a group becomes text of the whole."""
    _add(whole, "{")
    for index, alternative in enumerate(group.alternatives):
        if index:
            _add(whole, "|")
        for part in alternative:
            _add(whole, part)


def _add(group: _Group, part: str | _Group) -> None:
    group.alternatives[-1].append(part)
