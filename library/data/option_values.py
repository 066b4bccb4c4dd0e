"""How values of data options are written on the command line and in TOML files."""

from __future__ import annotations

import math
from typing import Any


def parse_resolution(value: Any) -> tuple[int, int]:
    """ "512" or "512,768" on the command line, 512 or [512, 768] in TOML, as (width, height)."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        sizes = [int(part) if isinstance(part, str) else part for part in parts]
    except ValueError:
        raise ValueError("is not a size; write one number (512) or width,height (512,768)") from None
    if len(sizes) not in (1, 2) or any(type(size) is not int for size in sizes):
        raise ValueError("is not a size; write one whole number or two, width and height")
    return (sizes[0], sizes[-1])


def parse_extension(value: Any) -> str:
    """ ".txt" from ".txt" or "txt"."""
    if not isinstance(value, str) or not value.strip("."):
        raise ValueError("is not a file extension such as .txt")
    return value if value.startswith(".") else f".{value}"


def parse_range(value: Any) -> tuple[float, float]:
    """Two numbers: "1.5,3" on the command line, [1.5, 3] in TOML."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        numbers = [float(part) for part in parts if not isinstance(part, bool)]
    except (TypeError, ValueError):
        raise ValueError("is not two numbers, such as 1.5,3.0") from None
    if len(numbers) != 2 or len(parts) != 2 or not all(map(math.isfinite, numbers)):
        raise ValueError("is not two numbers, such as 1.5,3.0")
    return (numbers[0], numbers[1])


def parse_table(value: Any) -> dict[str, Any]:
    """A TOML table as it is."""
    if not isinstance(value, dict):
        raise ValueError("is not a table")
    return value
