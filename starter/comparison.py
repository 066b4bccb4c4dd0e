"""Puts pictures of the same prompts side by side: a row per prompt, a column per folder.

python starter/comparison.py --prompts FILE --column TITLE FOLDER [--column TITLE FOLDER ...] --output FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 256  # pixels: side of a picture in the sheet
GAP = 12
HEADER, CAPTION = 48, 30  # pixels: height of the column titles and of the line above each row
PAPER, INK, FAINT = "white", "#202124", "#5f6368"


def comparison(prompts: Sequence[str], columns: Sequence[tuple[str, Sequence[Path]]]) -> Image.Image:
    """The sheet. Each column has a title and one picture per prompt."""
    width = GAP + len(columns) * (CELL + GAP)
    sheet = Image.new("RGB", (width, HEADER + len(prompts) * (CAPTION + CELL + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns):
        left = GAP + column * (CELL + GAP)
        draw.text((left + CELL / 2, HEADER / 2 + 4), title, INK, ImageFont.load_default(22), anchor="mm")
        for row, path in enumerate(pictures):
            with Image.open(path) as picture:
                cell = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (left, HEADER + row * (CAPTION + CELL + GAP) + CAPTION))
    for row, prompt in enumerate(prompts):
        middle = HEADER + row * (CAPTION + CELL + GAP) + CAPTION / 2
        draw.text((GAP, middle), prompt, FAINT, ImageFont.load_default(18), anchor="lm")
    return sheet


def prompts_of(path: Path) -> list[str]:
    """The prompts of a prompt file without their options (` --d 1`), empty lines and comments."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    return [line.partition(" --")[0] for line in lines if line and not line.startswith("#")]


def pictures_of(folder: Path, count: int) -> list[Path]:
    pictures = sorted(folder.glob("*.png"))
    if len(pictures) != count:
        raise SystemExit(f"{folder} holds {len(pictures)} pictures for {count} prompts")
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--column", nargs=2, action="append", required=True, metavar=("TITLE", "FOLDER"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    prompts = prompts_of(options.prompts)
    columns = [(title, pictures_of(Path(folder), len(prompts))) for title, folder in options.column]
    comparison(prompts, columns).save(options.output)


if __name__ == "__main__":
    main()
