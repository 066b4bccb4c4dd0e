"""Makes the pictures of docs/gen_img.md: runs the commands that stand there above them, and joins what they draw.

    python docs/pictures/make_gen_img.py [NAME ...]     all of them, or gen_img_NAME.webp alone

It needs what python quickstart.py leaves in outputs/quickstart. A picture whose command changes is made again by
this; one that is new needs a row in FIGURES.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.diffusion.samplers import SAMPLERS
from library.generate.contact_sheet import SheetPicture, contact_sheet

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gen_img.md"
BLOCK = re.compile(r"^```\n((?:(?!```).)*?)^```\n+!\[[^\]]*\]\(pictures/gen_img_(\w+)\.webp\)", re.M | re.S)
QUALITY = 88  # of WebP


@dataclass(frozen=True)
class Figure:
    """How the pictures of a command, or of several, become one."""

    title: str
    subtitle: str
    captions: tuple[str, ...]  # of the pictures that are drawn, in their order
    given: tuple[str, ...] = ()  # flags whose files stand before them
    each: tuple[str, tuple[str, ...]] = ("", ("",))  # a flag that the command is run with, once for each value


PAGODA, AT_128 = "a pagoda with green roofs above a lake", "20 steps of euler_a, scale 4"
NAMES = tuple(name for name in SAMPLERS if not name.startswith("k_"))
FIGURES = {
    "negative": Figure("a photo", AT_128, ("no negative prompt", "--n retina", "--n rocket")),
    "composition": Figure(
        "a white rocket under a night sky AND the retina of an eye :weight", AT_128, ("0", "0.7", "0.9", "1.2")
    ),
    "samplers": Figure("a raccoon between green leaves", "8 steps, scale 4", NAMES, each=("--sampler", NAMES)),
    "steps": Figure(PAGODA, "euler_a, scale 4", tuple(f"{count} steps" for count in (2, 4, 8, 16, 32))),
    "scales": Figure(PAGODA, "20 steps of euler_a", tuple(f"scale {scale}" for scale in (1, 2, 4, 8, 16))),
    "seeds": Figure(PAGODA, f"{AT_128}, --seed 7", ("",) * 6),
    "strengths": Figure(
        "a cup of coffee on a wooden table",
        AT_128,
        tuple(f"strength {strength}" for strength in (0.2, 0.4, 0.5, 0.6, 0.8, 1)),
        given=("--image_path",),
    ),
    "inpainting": Figure(
        "... and a pagoda",
        f"{AT_128}, strength 0.9",
        ("a white rocket ...", "a raccoon ..."),
        given=("--image_path", "--mask_path"),
    ),
    "highres": Figure(PAGODA, AT_128, ("plain", "first stage", "second stage, strength 0.4")),
    "regions": Figure(
        "a photo of sks cat AND ...",
        AT_128,
        ("AND a cup of coffee ...", "AND a raccoon ..."),
        given=("--mask_path",),
    ),
}


def main(names: list[str]) -> None:
    commands = {name: text for text, name in BLOCK.findall(PAGE.read_text(encoding="utf-8"))}
    if unknown := set(names) - set(commands):
        raise SystemExit(f"{PAGE.name} has no picture gen_img_{min(unknown)}.webp below a command")
    for name in names or commands:
        sheet = draw(name, commands[name])
        sheet.save(PAGE.parent / "pictures" / f"gen_img_{name}.webp", quality=QUALITY, method=6)


def draw(name: str, text: str) -> Image.Image:
    """The picture of the commands in a block of the page; the sheet of --grid is taken as it is."""
    lines = [shlex.split(line)[1:] for line in text.replace("\\\n", " ").splitlines() if line]
    with tempfile.TemporaryDirectory() as folder:
        if "--grid" in " ".join(lines[0]):
            run([*lines[0], "--outdir", folder])
            return Image.open(Path(folder, "grid.png")).convert("RGB")
        figure = FIGURES[name]
        flag, values = figure.each
        for number, (words, value) in enumerate((words, value) for value in values for words in lines):
            run([*words, *filter(None, (flag, value)), "--outdir", f"{folder}/{number:02}", "--sequential_file_name"])
        drawn = sorted(Path(folder).glob("*/*.png"))
        before = [(ROOT / lines[0][lines[0].index(flag) + 1], flag) for flag in figure.given]
        size = opened(drawn[0]).size
        pictures = [SheetPicture(opened(path).resize(size), caption) for path, caption in before]
        pictures += [SheetPicture(opened(path), caption) for path, caption in zip(drawn, figure.captions, strict=True)]
        return contact_sheet(figure.title, figure.subtitle, pictures)


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def run(words: list[str]) -> None:
    print(shlex.join(["python", *words]), flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
