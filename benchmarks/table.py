"""Printing of benchmark tables, and timing of whole commands."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table."""
    texts = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in texts
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(f"\n{title}\n\n" + "\n".join(lines), flush=True)


def median_seconds(action: Callable[[], object], runs: int = 5) -> tuple[float, float, float]:
    """(minimum, median, maximum) wall seconds over `runs`, after one that is not counted."""
    action()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times), statistics.median(times), max(times)


def run_command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A Python command from the repository's root."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=os.environ)
