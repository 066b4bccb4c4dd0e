"""Words of messages and reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def counted(number: int, what: str, many: str | None = None) -> str:
    """ "1 image", "2 images", "1,000 images"; `many` where the plural is another word."""
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def aligned(rows: Sequence[Sequence[object]], numbers: Iterable[int] = ()) -> list[str]:
    """Columns of equal width, two blanks apart; the last one as wide as it is."""
    numbers = frozenset(numbers)
    texts = [[str(cell) for cell in row] for row in rows]
    if not texts:
        return []
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    return [
        "  " + "  ".join(
            text.rjust(width) if column in numbers else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    ]  # fmt: skip
