"""A JSON object of any size, read entry by entry: in memory is the part of the file that is being parsed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20  # characters read at once
NEAR = 16  # characters: an error so close to the end of what was read may come from its being cut off there
BLANKS = re.compile(r"[ \t\n\r]*")


class NotJSON(ValueError):
    """What is wrong with a text, and in which line."""

    def __init__(self, problem: str, line: int, key: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.line, self.key = problem, line, key


class NoObject(ValueError):
    """The text is something else than an object."""


def object_entries(file: TextIO) -> Iterator[tuple[str, Any, int]]:
    """(key, value, line of the key) of the entries of the object in `file`, in their order.

    Lines count from 1. Raises NotJSON and NoObject; a key that stands twice in an object within is NotJSON, one of the
    object itself is the caller's to find.
    """
    text = _Window(file)
    if text.next_character() != "{":
        raise NoObject
    text.at += 1
    if text.next_character() == "}":
        text.at += 1
        return text.expect_end()
    while True:
        if text.next_character() != '"':
            raise NotJSON("Expecting property name enclosed in double quotes", text.line())
        line = text.line()
        key = text.value(None)
        text.take(":", "Expecting ':' delimiter", key)
        text.next_character()
        yield key, text.value(key), line
        if text.take(",}", "Expecting ',' delimiter", key) == "}":
            return text.expect_end()


def parse_line(line: str, number: int) -> Any:
    """The value of a line that is JSON by itself; raises NotJSON with its `number`."""
    try:
        return DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise NotJSON(error.msg, number) from None
    except _TwiceError as error:
        raise NotJSON(str(error), number) from None
    except RecursionError:
        raise NotJSON("nested too deeply", number) from None


class _TwiceError(Exception):
    """A key that stands twice in one object."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _TwiceError(f"the key {key!r} stands in it twice")
    return content


DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles)


class _Window:
    """The part of a file from what is parsed next to as far as was read."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ""
        self.at = 0
        self._line, self._counted_to = 1, 0  # the line in which the character of that number stands

    def line(self, at: int | None = None) -> int:
        """The line of a place behind those asked for before, or of `at`."""
        at = self.at if at is None else at
        self._line += self.text.count("\n", self._counted_to, at)
        self._counted_to = at
        return self._line

    def next_character(self) -> str:
        """Goes to the next character that is no blank; empty at the end of the file."""
        while True:
            match = BLANKS.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def take(self, characters: str, problem: str, key: str | None) -> str:
        found = self.next_character()
        if not found or found not in characters:
            raise NotJSON(problem, self.line(), key)
        self.at += 1
        return found

    def expect_end(self) -> None:
        if self.next_character():
            raise NotJSON("Extra data", self.line())

    def value(self, key: str | None) -> Any:
        """The value that begins here; `key` is told where it is none."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - NEAR
                if not (cut_off and self._read_on()):
                    raise NotJSON(error.msg, self.line(error.pos), key) from None
            except _TwiceError as error:
                raise NotJSON(str(error), self.line(), key) from None
            except RecursionError:
                raise NotJSON("nested too deeply", self.line(), key) from None
            else:
                enough = end + NEAR if isinstance(value, (int, float)) else end + 1  # "1." may become 1.5
                if enough <= len(self.text) or not self._read_on():
                    self.at = end
                    return value

    def _read_on(self) -> bool:
        """More of the file, and what is done with forgotten; False at its end. A long value is read by doubling."""
        part = self.file.read(max(CHUNK, len(self.text) - self.at))
        if not part:
            return False
        self.line()
        self.text = self.text[self.at :] + part
        self.at = self._counted_to = 0
        return True
