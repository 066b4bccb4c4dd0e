"""Words of messages and reports."""

from __future__ import annotations


def counted(number: int, what: str, many: str | None = None) -> str:
    """ "1 image", "2 images", "1,000 images"; `many` where the plural is another word."""
    return f"{number:,} {what if number == 1 else many or what + 's'}"
